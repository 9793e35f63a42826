"""The native model as a model of ``transformers``: importing this module makes the Auto classes know it.

Tensors padded to a rectangle are packed at this border, so padding on either side cannot change a logit. What is
saved has the names of a native directory, and a native directory loads as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.config import ModelConfig
from fourfold.model.block import Block
from fourfold.model.cache import Cache, PagePool, SequenceState, layout
from fourfold.model.context import Context
from fourfold.model.sequence import IGNORE, Packed
from fourfold.model.transformer import Model
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.checkpoint import DTYPES, CheckpointError, atomic_directory, load_model, resolve

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(f"fourfold.weights.hf needs transformers 5 (pip install 'fourfold[hf]'): {error}") from error

PAGE_SIZE = 32
PREFIX = "model."  # of every name in memory, but not on disk
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
CONFIG_FIELDS = tuple(f.name for f in fields(ModelConfig))
# what flattening collators say beside position_ids, which say it all
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


class FourfoldConfig(PreTrainedConfig):
    """``config.json``: the fields of :class:`ModelConfig`, and those that transformers keeps beside them.

    Raises ConfigError, which names the field, if they do not make a model.
    """

    model_type = "fourfold"
    keys_to_ignore_at_inference = ["past_key_values"]  # Trainer adds it to a list of its own

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in CONFIG_FIELDS if name in kwargs}
        for name, value in ModelConfig.from_dict(given).to_dict().items():
            setattr(self, name, value)
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, cfg: ModelConfig, **kwargs: Any) -> FourfoldConfig:
        return cls(**cfg.to_dict(), **kwargs)

    @property
    def native(self) -> ModelConfig:
        return ModelConfig.from_dict({name: getattr(self, name) for name in CONFIG_FIELDS})

    # what other tools look for at the top, and a ModelConfig has further down
    @property
    def num_attention_heads(self) -> int:
        return self.native.attention.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        a = self.native.attention
        return a.num_key_value_heads if a.kind == "gqa" else a.num_attention_heads

    @property
    def num_experts(self) -> int:
        return self.native.moe.n_routed_experts


class FourfoldCache:
    """What ``generate`` keeps: one cached sequence for each row of the batch. Rows may share full pages.

    ``columns``: the columns of the padded batch that it stands for, padding included.
    """

    is_compileable = False

    def __init__(self, cfg: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        multiple = layout(cfg).multiple
        self.cfg, self.columns = cfg, 0
        self.states = [SequenceState() for _ in range(rows)]
        self.pool = PagePool(cfg, max(1, rows), -(-PAGE_SIZE // multiple) * multiple, dtype, device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def growing(self, lengths: list[int]) -> Cache:
        """The cache as one forward sees it that adds ``lengths`` positions to the rows."""
        self._make_room(sum(self.pool.missing(state, n) for state, n in zip(self.states, lengths, strict=True)))
        return Cache(self.pool, self.states)

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` is; each goes on by itself."""
        self._make_room(len(rows))  # a page that is not full cannot be shared
        before = self.states
        self.states = [self._fork(before[row], self.pool) for row in rows]
        for state in before:
            self.pool.release(state.pages)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(torch.arange(len(self.states))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select([row for row in range(len(self.states)) for _ in range(repeats)])

    def _make_room(self, pages: int) -> None:
        """At least ``pages`` free pages, in a larger pool if need be."""
        old = self.pool
        if pages > old.free:
            held = sum(len(state.pages) for state in self.states)
            self.pool = PagePool(self.cfg, 2 * (held + pages), old.page_size, old.data.dtype, old.data.device)
            self.states = [self._fork(state, old) for state in self.states]

    def _fork(self, state: SequenceState, source: PagePool) -> SequenceState:
        """A copy of ``state``, which lies in ``source``; of that pool it takes over the full pages."""
        kept = state.length // source.page_size if source is self.pool else 0
        new = SequenceState(state.pages[:kept], state.length, list(state.history), state.tail)
        self.pool.retain(new.pages)
        self.pool.reserve(new, 0)
        self.pool.data[new.pages[kept:]] = source.data[state.pages[kept : len(new.pages)]]
        return new


def real_positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """bool [B, L]: which of the tokens int64 [B, L] are not padding, by the last L columns of the mask."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    rows, columns = input_ids.shape
    if attention_mask.ndim != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < columns:
        raise ValueError(f"attention_mask: has shape {list(attention_mask.shape)}, must be [{rows}, {columns}]")
    return attention_mask[:, -columns:] != 0


def pack_padded(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past: FourfoldCache | None = None,
) -> Packed:
    """The tokens int64 [B, L] that are not padding, row by row; with ``past``, each row continues its sequence.

    attention_mask: 0 or 1, [B, columns of ``past`` + L]; position_ids: int64 [B, L], which may start again at 0
    inside a row: there a new sequence begins. Raises ValueError on a mask with holes, or on other positions.
    """
    real = real_positions(input_ids, attention_mask)
    rows, columns = input_ids.shape
    if attention_mask is not None:
        _check_mask(attention_mask != 0, columns, past)
    device = input_ids.device
    counts = real.sum(1)
    if past is None:
        first = torch.cat([real[:, :1], real[:, 1:] & ~real[:, :-1]], dim=1)
        if position_ids is not None:
            first = first | (position_ids == 0)
        starts = first[real].nonzero()[:, 0]
        lengths = torch.cat([starts, counts.sum()[None]]).diff()
        positions = torch.zeros_like(starts)
    else:
        if len(past.states) != rows:
            raise ValueError(f"past_key_values: holds {len(past.states)} rows, the batch has {rows}")
        lengths, positions = counts, torch.tensor([state.length for state in past.states], device=device)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    tokens = input_ids[real]
    offsets = (positions - cu_seqlens[:-1]).repeat_interleave(lengths, output_size=len(tokens))
    positions = torch.arange(len(tokens), device=device) + offsets
    if position_ids is not None and not torch.equal(position_ids.expand(rows, -1)[real], positions):
        raise ValueError("position_ids: must count the tokens of each sequence from 0, without its padding")
    text, targets = torch.zeros_like(tokens), torch.full_like(tokens, IGNORE)
    return Packed(tokens, positions, text, text, targets, cu_seqlens)


def _check_mask(mask: Tensor, columns: int, past: FourfoldCache | None) -> None:
    wanted = columns + (past.columns if past is not None else 0)
    if mask.shape[1] != wanted:
        raise ValueError(f"attention_mask: has {mask.shape[1]} columns, cache and input have {wanted}")
    runs = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if (runs > 1).any():
        row = int((runs > 1).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} has a hole; only the left and the right end may be padded")
    if past is not None and mask[:, : past.columns].sum(1).tolist() != [state.length for state in past.states]:
        raise ValueError("attention_mask: does not mask what it masked when past_key_values was filled")


class FourfoldModel(Model):
    """The decoder up to its last norm, on padded tensors; what lies after is :class:`FourfoldForCausalLM`'s."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FourfoldCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        packed: Packed | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids: int64 [B, L], or ``packed`` [T] (media, no cache; B = 1, L = T).

        Returns ``last_hidden_state`` [B, L, d], zero at padding, and the cache if ``use_cache`` or one was given.
        Raises ValueError, or TypeError for an argument that this model cannot honour.
        """
        bounds, *_ = [kwargs.pop(name, None) for name in PACKING_ARGUMENTS]
        _refuse(inputs_embeds=inputs_embeds, **kwargs)
        cache = past_key_values
        if (input_ids is None) == (packed is None):
            raise ValueError("input_ids: give either these or packed")
        if packed is not None:
            _refuse(use_cache=use_cache, past_key_values=cache, attention_mask=attention_mask)
            with self._recomputing():
                return BaseModelOutputWithPast(last_hidden_state=super().forward(packed).logits[None])
        assert input_ids is not None
        if cache is not None or use_cache:
            if torch.is_grad_enabled():
                raise ValueError("use_cache: no gradient passes through the cache; call under torch.no_grad()")
            weight = self.embed_tokens.weight
            cache = cache or FourfoldCache(self.cfg, len(input_ids), weight.dtype, weight.device)
        packed = pack_padded(input_ids, attention_mask, position_ids, cache)
        if bounds is not None and packed.cu_seqlens.tolist() != bounds.tolist():
            raise ValueError("cu_seq_lens_q: must lie where position_ids are 0")
        if not len(packed):
            raise ValueError("input_ids: there is no token that attention_mask does not mask")
        view = cache.growing(packed.cu_seqlens.diff().tolist()) if cache is not None else None
        with self._recomputing():
            hidden = super().forward(packed, view).logits
        if cache is not None:
            cache.columns += input_ids.shape[1]
        laid_back = hidden.new_zeros(*input_ids.shape, hidden.shape[-1])
        laid_back[real_positions(input_ids, attention_mask)] = hidden
        return BaseModelOutputWithPast(last_hidden_state=laid_back, past_key_values=cache)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """While gradient checkpointing is on, a block keeps its input alone and runs again in the backward pass."""
        active = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if active and getattr(self._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True):
            raise ValueError("use_reentrant: must be False; gradients also flow through what layers share")
        for block in self.layers if active else ():
            block.forward = _recomputed(block, self._gradient_checkpointing_func)
        try:
            yield
        finally:
            for block in self.layers if active else ():
                del block.forward


def _recomputed(block: Block, checkpoint: Callable[..., Tensor]) -> Callable[[Tensor, Context], Tensor]:
    """The forward of a block under ``checkpoint``: every run meets the context as the first one did."""
    original = block.forward

    def forward(streams: Tensor, ctx: Context) -> Tensor:
        entry = _snapshot(ctx)

        def run(streams: Tensor) -> Tensor:
            own = _snapshot(entry)
            out = original(streams, own)
            vars(ctx).update(vars(own))  # what layers share, for those to come
            return out

        return checkpoint(run, streams)

    return forward


def _snapshot(ctx: Context) -> Context:
    taken = copy.copy(ctx)
    taken.shared = copy.copy(ctx.shared)
    return taken


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise TypeError(f"{name}: the fourfold model cannot honour this argument here")


class FourfoldForCausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`Model` that speaks the language of transformers: Trainer, generate, adapters, save and load.

    It trains the cross-entropy alone; indexers, router biases and MTP learn in ``fourfold train``.
    """

    config_class = FourfoldConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FourfoldModel"]
    _keep_in_fp32_modules_strict = [r"mlp\.gate\.bias", r"mlp\.gate\.media_bias"]
    _is_stateful = True  # no assisted generation: compressed layers cannot take back a position

    def __init__(self, config: FourfoldConfig) -> None:
        super().__init__(config)
        self.model = FourfoldModel(config.native)
        self.post_init()

    @classmethod
    def of(cls, model: Model, **kwargs: Any) -> FourfoldForCausalLM:
        """``model`` itself, its tensors shared; ``kwargs`` go to the config."""
        with torch.device("meta"):
            made = cls(FourfoldConfig.of(model.cfg, **kwargs))
        made.model.load_state_dict(model.state_dict(), assign=True)
        return made.train(model.training)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, of a native directory too. Raises CheckpointError if tensors are missing or foreign."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        faults = [f"{name.removeprefix(PREFIX)} is missing" for name in sorted(info["missing_keys"])]
        faults += [f"{name} is not part of this model" for name in sorted(info["unexpected_keys"])]
        if faults:
            raise CheckpointError(f"{args[0] if args else cls.__name__}: " + "; ".join(faults))
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """As in transformers, the tensors under their native names. (Of an adapter, under those that PEFT expects.)"""
        if not getattr(self, "_hf_peft_config_loaded", False):
            state_dict = {n.removeprefix(PREFIX): t for n, t in (state_dict or self.state_dict()).items()}
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a model built anew has set its weights itself, and one that lacks some is refused."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FourfoldCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        packed: Packed | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits float32 [B, L, V], zero at padding, of the last ``logits_to_keep`` columns (0: of all) or of those
        it names; arguments as :meth:`FourfoldModel.forward`, and what ``loss_function`` takes.

        labels: int64 [B, L], the tokens themselves, -100 where there is no loss. The first of a sequence is no target.
        """
        loss_arguments = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, packed, **kwargs
        )
        hidden = out.last_hidden_state
        real = torch.ones_like(hidden[..., 0], dtype=torch.bool)
        if input_ids is not None:
            real = real_positions(input_ids, attention_mask)
        columns = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept = real[:, columns]
        rows = Model.head(self.model, hidden[:, columns][kept])
        logits = rows.new_zeros(*kept.shape, rows.shape[-1])
        logits[kept] = rows
        loss = None
        if labels is not None:
            if kept.shape != labels.shape or packed is not None:
                raise ValueError(f"labels: have shape {list(labels.shape)}, the logits {list(kept.shape)}")
            if loss_arguments.get("shift_labels") is None:
                loss_arguments["shift_labels"] = _next_labels(labels, real, position_ids)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_arguments)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("attention_mask: generation continues the last column; pad on the left")
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward makes a FourfoldCache

    def get_output_embeddings(self) -> nn.Linear:
        """The head; where it is tied, a view of the embedding."""
        if self.model.lm_head is not None:
            return self.model.lm_head
        weight = self.model.embed_tokens.weight
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        head.weight = weight
        return head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        if new_num_tokens not in (None, self.config.vocab_size) or any(args) or kwargs.get("pad_to_multiple_of"):
            raise ValueError(f"vocab_size: stays {self.config.vocab_size}; the n-gram memory is bound to its token ids")
        return self.model.embed_tokens


def _next_labels(labels: Tensor, real: Tensor, position_ids: Tensor | None) -> Tensor:
    """int64 [B, L]: the label one column on, where that continues the sequence."""
    continues = real[:, :-1] & real[:, 1:]
    if position_ids is not None:
        continues = continues & (position_ids[:, 1:] != 0)
    return F.pad(labels[:, 1:].masked_fill(~continues, IGNORE), (0, 1), value=IGNORE)


def hf_tokenizer(tokenizer: Tokenizer, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer for transformers: pads on the left, and its chat template gives what ``encode_chat`` gives.

    The names of special tokens in what users wrote stay text only under ``sanitize_control_tokens=True``.
    """
    for name in ("<|bos|>", "<|eos|>", "<|pad|>"):
        tokenizer.special(name)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE.read_text().rstrip("\n"),
        **({} if max_length is None else {"model_max_length": max_length}),
    )


def export_hf(source: str | Path | tuple[Model, Tokenizer], destination: str | Path, dtype: str = "float32") -> Path:
    """Writes a directory that AutoModelForCausalLM and AutoTokenizer load, whole or not at all.

    source: a bundled name, a model directory, or a model with its tokenizer; dtype: of parameters read from disk,
    float32 or bfloat16.
    Raises CheckpointError, or TokenizerError if the tokenizer lacks the native special tokens.
    """
    model, tokenizer = source if isinstance(source, tuple) else load_model(resolve(str(source)), DTYPES[dtype])
    ids = {f"{name}_token_id": tokenizer.special(f"<|{name}|>") for name in ("bos", "eos", "pad")}
    with atomic_directory(Path(destination)) as partial:
        FourfoldForCausalLM.of(model, **ids).save_pretrained(partial)
        hf_tokenizer(tokenizer, model.cfg.max_position_embeddings).save_pretrained(partial)
    return Path(destination)


AutoConfig.register(FourfoldConfig.model_type, FourfoldConfig, exist_ok=True)
AutoModelForCausalLM.register(FourfoldConfig, FourfoldForCausalLM, exist_ok=True)
