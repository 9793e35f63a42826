// Example questions, and the pictures, clips and sounds that go with them, made here in the browser.

const COLOURS = { red: "#dc2828", blue: "#325adc", green: "#28a046", orange: "#f58c1e", yellow: "#f5dc32", purple: "#8c3cb4" };

export const EXAMPLES = [
  { text: "Who are you?" },
  { text: "What is 47 + 38?", thinking: true },
  { text: "The code of river is 4821. The code of lamp is 7305. The code of stone is 1964. What is the code of lamp?", label: "Find a code in a text" },
  { text: "What is the capital of France?" },
  { text: "What is this?", media: [() => picture("red-circle.png", [["red", "circle", 48, 48, 34]])] },
  { text: "How many shapes are there?", media: [() => picture("shapes.png", [["blue", "square", 26, 26, 17], ["orange", "star", 70, 28, 19], ["green", "triangle", 30, 72, 18]])] },
  { text: "Is the tone rising or falling?", media: [() => sound("rising.wav", sweep(260, 780, 0.7))] },
  { text: "How many beeps do you hear?", media: [() => sound("beeps.wav", beeps(3))] },
  { text: "Which way does it move?", media: [() => clip("moving.gif", "red", "left")] },
];

const toUrl = (mime, bytes) => {
  let binary = "";
  for (let i = 0; i < bytes.length; i += 0x8000) binary += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return `data:${mime};base64,${btoa(binary)}`;
};

function canvasOf(size, back) {
  const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.fillStyle = back;
  pen.fillRect(0, 0, size, size);
  return [canvas, pen];
}

function draw(pen, colour, shape, x, y, r) {
  pen.fillStyle = COLOURS[colour];
  pen.beginPath();
  if (shape === "circle") pen.arc(x, y, r, 0, 2 * Math.PI);
  else if (shape === "square") pen.rect(x - 0.85 * r, y - 0.85 * r, 1.7 * r, 1.7 * r);
  else {
    const radii = shape === "triangle" ? [r, r, r] : Array.from({ length: 10 }, (_, i) => (i % 2 ? 0.42 * r : r));
    radii.forEach((q, i) => {
      const angle = -Math.PI / 2 + (i * 2 * Math.PI) / radii.length;
      pen.lineTo(x + q * Math.cos(angle), y + q * Math.sin(angle));
    });
  }
  pen.fill();
}

/** A PNG of shapes: [colour, shape, x, y, radius] on 96 x 96 pixels. */
function picture(name, shapes) {
  const [canvas, pen] = canvasOf(96, "#f0f0ee");
  for (const shape of shapes) draw(pen, ...shape);
  return { kind: "image", name, url: canvas.toDataURL("image/png") };
}

/** An animated GIF of a circle that moves. */
function clip(name, colour, direction) {
  const [dx, dy] = { left: [-1, 0], right: [1, 0], up: [0, -1], down: [0, 1] }[direction];
  const frames = [];
  for (let i = 0; i < 8; i++) {
    const [, pen] = canvasOf(96, "#d8e4ea");
    const far = (i - 3.5) * 7;
    draw(pen, colour, "circle", 48 + dx * far, 48 + dy * far, 18);
    frames.push(pen.getImageData(0, 0, 96, 96).data);
  }
  return { kind: "video", name, url: toUrl("image/gif", gif(frames, 96, 12)) };
}

/** GIF89a of RGBA frames, `delay` in hundredths of a second; LZW codes stay 9 bits wide by clearing the table in time. */
function gif(frames, size, delay) {
  const out = [];
  const word = (n) => out.push(n & 255, n >> 8);
  const palette = new Map();
  const colourOf = (r, g, b) => {
    const key = ((r >> 4) << 8) | ((g >> 4) << 4) | (b >> 4);
    if (!palette.has(key) && palette.size < 256) palette.set(key, palette.size);
    return palette.get(key) ?? 0;
  };
  const indexed = frames.map((data) => Array.from({ length: size * size }, (_, i) => colourOf(data[4 * i], data[4 * i + 1], data[4 * i + 2])));
  out.push(...[..."GIF89a"].map((c) => c.charCodeAt(0)));
  word(size), word(size);
  out.push(0xf7, 0, 0);
  const keys = [...palette.keys()];
  for (let i = 0; i < 256; i++) out.push(((keys[i] >> 8) & 15) * 17, ((keys[i] >> 4) & 15) * 17, (keys[i] & 15) * 17);
  out.push(0x21, 0xff, 11, ...[..."NETSCAPE2.0"].map((c) => c.charCodeAt(0)), 3, 1, 0, 0, 0);
  for (const pixels of indexed) {
    out.push(0x21, 0xf9, 4, 4);
    word(delay);
    out.push(0, 0, 0x2c, 0, 0, 0, 0);
    word(size), word(size);
    out.push(0, 8);
    const codes = [];
    pixels.forEach((p, i) => (i % 250 ? codes.push(p) : codes.push(256, p)));
    codes.push(257);
    const bytes = [];
    let held = 0, bits = 0;
    for (const code of codes) {
      held |= code << bits;
      for (bits += 9; bits >= 8; bits -= 8, held >>= 8) bytes.push(held & 255);
    }
    if (bits) bytes.push(held & 255);
    for (let i = 0; i < bytes.length; i += 255) {
      const block = bytes.slice(i, i + 255);
      out.push(block.length, ...block);
    }
    out.push(0);
  }
  out.push(0x3b);
  return new Uint8Array(out);
}

const RATE = 16000;

function sweep(from, to, seconds) {
  let phase = 0;
  return Float32Array.from({ length: RATE * seconds }, (_, i) => {
    phase += (2 * Math.PI * from * (to / from) ** (i / (RATE * seconds))) / RATE;
    return 0.5 * Math.sin(phase) * Math.min(1, i / 160, (RATE * seconds - i) / 160);
  });
}

function beeps(count) {
  const beep = sweep(880, 880, 0.11), gap = new Float32Array(RATE * 0.12);
  return Float32Array.from([...gap, ...Array(count).fill([...beep, ...gap]).flat()]);
}

/** 16-bit mono WAV. */
function sound(name, wave) {
  const view = new DataView(new ArrayBuffer(44 + 2 * wave.length));
  const letters = (at, s) => [...s].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  letters(0, "RIFF"), view.setUint32(4, 36 + 2 * wave.length, true), letters(8, "WAVEfmt ");
  view.setUint32(16, 16, true), view.setUint16(20, 1, true), view.setUint16(22, 1, true), view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true), view.setUint16(32, 2, true), view.setUint16(34, 16, true);
  letters(36, "data"), view.setUint32(40, 2 * wave.length, true);
  wave.forEach((v, i) => view.setInt16(44 + 2 * i, Math.round(v * 32767), true));
  return { kind: "audio", name, url: toUrl("audio/wav", new Uint8Array(view.buffer)) };
}
