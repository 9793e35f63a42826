"""The closed vocabularies: what the bundled model is taught to name."""

from __future__ import annotations

CLOTHES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

WORDS = tuple(
    "yes no stop go left right up down red green blue yellow black white cat dog bird fish horse cow sheep lion "
    "mouse house tree car boat train water fire music flower apple bread sun moon happy hello goodbye thank".split()
)

# Emoji by category, each by its label in emojibase-data; "label=name" where everyday English says it otherwise.
EMOJI = {
    "animal": """monkey, gorilla, dog, wolf, fox, cat, lion, tiger, horse, unicorn, zebra, deer, bison,
        cow, pig, ewe=sheep, goat, camel, llama, giraffe, elephant, rhinoceros, hippopotamus=hippo,
        mouse, rabbit, beaver, hedgehog, bat, bear, polar bear, koala, panda, sloth, kangaroo, turkey,
        chicken, rooster, baby chick=chick, bird, penguin, dove, eagle, duck, swan, owl, flamingo,
        peacock, parrot, frog, crocodile, turtle, lizard, snake, dragon, T-Rex=dinosaur, whale, dolphin,
        seal, fish, shark, octopus, jellyfish, crab, lobster, shrimp, snail, butterfly, bug=caterpillar,
        ant, honeybee=bee, beetle, lady beetle=ladybug, spider, scorpion, mosquito, fly, worm""",
    "food": """grapes, watermelon, lemon, banana, pineapple, mango, red apple=apple, pear, peach,
        cherries, strawberry, blueberries, kiwi fruit=kiwi, tomato, olive, coconut, avocado, eggplant,
        potato, carrot, ear of corn=corn, hot pepper=chili pepper, bell pepper, cucumber, broccoli,
        garlic, onion, peanuts, bread, croissant, pretzel, pancakes, waffle, cheese wedge=cheese, poultry
        leg=chicken leg, bacon, hamburger, french fries, pizza, hot dog, sandwich, taco, egg, popcorn,
        butter, spaghetti, sushi, ice cream, doughnut, cookie, birthday cake, cupcake, pie, chocolate
        bar=chocolate, candy, honey pot=honey, hot beverage=coffee, teapot, wine glass, beer mug=beer,
        bubble tea""",
    "plant": """rose, sunflower, tulip, cherry blossom, evergreen tree=pine tree, deciduous tree=tree,
        palm tree, cactus, shamrock, maple leaf, mushroom""",
    "vehicle": """locomotive=steam train, train, bus, ambulance, fire engine=fire truck, police car,
        taxi, automobile=car, delivery truck=truck, tractor, racing car, motorcycle, bicycle, skateboard,
        sailboat, canoe, ship, airplane, helicopter, rocket, flying saucer""",
    "clothing": """glasses, sunglasses, necktie=tie, t-shirt, jeans, scarf, gloves, socks, shorts,
        handbag, backpack, running shoe=sneaker, high-heeled shoe=high heel, crown, top hat, graduation
        cap, billed cap=cap, ring""",
    "object": """spoon, kitchen knife=knife, rock, tent, anchor, stop sign, luggage=suitcase, hourglass
        done=hourglass, watch, alarm clock, umbrella, balloon, ribbon, wrapped gift=gift, trophy, soccer
        ball, baseball, basketball, volleyball, tennis=tennis ball, boxing glove, kite, game die=dice,
        puzzle piece, teddy bear, gem stone=diamond, bell, microphone, headphone=headphones, saxophone,
        trumpet, accordion, guitar, violin, drum, flute, mobile phone=phone, telephone, battery, laptop,
        keyboard, floppy disk, television, camera, candle, light bulb, flashlight, books, newspaper,
        money bag, credit card, envelope, pencil, paintbrush, briefcase, calendar, paperclip, scissors,
        locked=lock, key, hammer, axe, bomb, shield, carpentry saw=saw, wrench, screwdriver, gear,
        magnet, ladder, microscope, telescope, syringe, pill, door, mirror, bed, chair, toilet, bathtub,
        broom, basket, bucket, toothbrush, shopping cart""",
    "nature": """volcano, mountain, sun, full moon, crescent moon, star, cloud, tornado, rainbow,
        snowflake, snowman, comet, fire, droplet=water drop, high voltage=lightning""",
    "building": """house, hospital, castle, church, fountain, ferris wheel""",
    "face": """grinning face=happy face, winking face, thinking face, sleeping face, crying face, angry
        face, clown face, nerd face, cowboy hat face=cowboy, robot, ghost, alien, skull, red heart=heart""",
}


def emoji_names() -> dict[str, tuple[str, str]]:
    """emojibase label -> (the name we teach, category)."""
    names = {}
    for category, listed in EMOJI.items():
        for entry in listed.split(","):
            label, _, name = " ".join(entry.split()).partition("=")
            names[label] = (name or label, category)
    return names


# Sonic Pi samples by how their file names start -> what we call them.
SOUNDS = {
    "bd_": "kick drum",
    "drum_heavy_kick": "kick drum",
    "drum_bass": "kick drum",
    "drum_snare": "snare drum",
    "sn_": "snare drum",
    "elec_hi_snare": "snare drum",
    "elec_snare": "snare drum",
    "drum_cymbal": "cymbal",
    "drum_splash": "cymbal",
    "elec_cymbal": "cymbal",
    "drum_tom": "tom drum",
    "tabla_": "tabla",
    "bass_": "bass",
    "guit_": "guitar",
    "perc_bell": "bell",
    "elec_bell": "bell",
    "elec_chime": "bell",
    "elec_triangle": "bell",
    "vinyl_": "record scratch",
    "mehackit_robot": "robot",
    "glitch_robot": "robot",
    "mehackit_phone": "phone",
}
