"""The native model under the trainers of others: TRL's for supervised and reinforcement learning, PEFT's adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from fourfold.model.transformer import Model
from fourfold.text.tokenizer import train_tokenizer
from fourfold.weights.hf import FourfoldForCausalLM, export_hf
from tests.model import tiny
from tests.weights.test_hf import SPARSE

VOCABULARY = 272
NANO_LIKE = SPARSE | {"vocab_size": VOCABULARY, "engram.compressed_vocab_size": VOCABULARY, "media": tiny.MEDIA}
SAID = "four of four"
LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_a_proj", "kv_b_proj", "o_proj"], task_type="CAUSAL_LM")
# what these trainers would do otherwise: bfloat16, a GPU, files, and reports to services
PLAIN: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "seed": 0,
}


@pytest.fixture(autouse=True, scope="module")
def offline() -> Iterator[None]:
    """No connection to anywhere, and one thread: the tensors are too small to share out."""

    def refuse(_: Any, address: Any) -> None:
        raise OSError(f"a test wanted to connect to {address}")

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.socket.connect", refuse)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with everything that nano has, as files that the Auto classes read."""
    tokenizer = train_tokenizer([SAID], VOCABULARY)
    torch.manual_seed(0)
    model = Model(tiny.config(**NANO_LIKE))
    return export_hf((model, tokenizer), tmp_path_factory.mktemp("trl") / "model")


@pytest.fixture
def model(directory: Path) -> FourfoldForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


def moved(model: FourfoldForCausalLM, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def state(model: FourfoldForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logged(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def talks(n: int) -> Dataset:
    turns = [{"role": "user", "content": "What is four?"}, {"role": "assistant", "content": SAID}]
    return Dataset.from_dict({"messages": [turns] * n})


def sft(model: Any, tokenizer: Any, folder: Path, **more: Any) -> SFTTrainer:
    settings = SFTConfig(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        assistant_only_loss=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **PLAIN,
    )
    return SFTTrainer(model, args=settings, train_dataset=talks(12), processing_class=tokenizer, **more)


def test_sft(model: FourfoldForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    before = state(model)
    trainer = sft(model, tokenizer, tmp_path)
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 6 and losses[-1] < 0.6 * losses[0]
    names = moved(model, before)
    for part in ("embed_tokens", "engrams", "mlp.gate.weight", "gate_up_proj", "residual", "kv_b_proj", "lm_head"):
        assert any(part in name for name in names), f"{part} learnt nothing"


def test_grpo(model: FourfoldForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    """Prompts of different lengths, so that some are padded; the reward is for one letter."""
    said: list[str] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        said.extend(completions)
        return [float(len(set(completion))) for completion in completions]

    before = state(model)
    settings = GRPOConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        **PLAIN,
    )
    prompts = Dataset.from_dict({"prompt": ["four", "four of four of", "of", "fo"] * 2})
    trainer = GRPOTrainer(model, reward, args=settings, train_dataset=prompts, processing_class=tokenizer)
    trainer.train()
    assert len(said) == 16 and len(logged(trainer, "reward")) == 2
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    assert {"model.lm_head.weight", "model.embed_tokens.weight"} <= moved(model, before)


def test_lora(model: FourfoldForCausalLM, tokenizer: Any, directory: Path, tmp_path: Path) -> None:
    """An adapter trains alone, and read from its file onto the model gives the same logits to the bit."""
    before = state(model)
    trainer = sft(model, tokenizer, tmp_path, peft_config=LORA)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    trainer.model.save_pretrained(tmp_path / "adapter")
    assert sorted(path.suffix for path in (tmp_path / "adapter").glob("adapter_model*")) == [".safetensors"]
    ids = tokenizer(SAID, return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        trained, plain = trainer.model.eval()(input_ids=ids).logits, base(input_ids=ids).logits
        again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, trained)
        assert not torch.allclose(trained, plain, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.unload().state_dict().items())
