"""What a teacher computed, by example, so that it need not compute it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: Logits with one for each token, and a softmax over the tokens.
OVER_TOKENS = ("start_logits", "end_logits")


@dataclass(frozen=True)
class TeacherOutputs:
    """Logits by name, and the hidden states that were asked for."""

    logits: dict[str, torch.Tensor]
    hidden_states: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Example:
    """One example: its logits, and its hidden states ``(layers, tokens, features)``
    without padding."""

    logits: dict[str, torch.Tensor]
    hidden: torch.Tensor | None

    @property
    def bytes(self) -> int:
        held = list(self.logits.values())
        if self.hidden is not None:
            held.append(self.hidden)
        return sum(t.numel() * t.element_size() for t in held)


class TeacherCache:
    """Outputs by example in float16, up to ``limit`` bytes; what does not fit any more
    is not kept.

    An example is known by its token ids, its other integer inputs and the positions of
    its tokens, so padding behind it and the batch that it comes in do not matter.
    Inputs that are not one integer for each token are not cached.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._examples: dict[bytes, _Example] = {}

    def __len__(self) -> int:
        return len(self._examples)

    def keys(self, inputs: Mapping[str, Any]) -> list[bytes]:
        """One key for each example of a batch; none when it cannot be cached."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not self.limit or ids is None or mask is None or ids.dim() != 2:
            return []
        tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        if any(t.shape != ids.shape or t.is_floating_point() for t in tensors.values()):
            return []
        rows = torch.stack([tensors[k].long() for k in sorted(tensors)], dim=1).cpu()
        kept = mask.bool().cpu()
        rows = rows * kept[:, None]
        # one past the last token that counts
        ends = (kept * torch.arange(1, mask.shape[1] + 1)).amax(1).tolist()
        return [
            row[:, :end].numpy().tobytes() for row, end in zip(rows, ends, strict=True)
        ]

    def find(
        self, keys: list[bytes], inputs: Mapping[str, Any]
    ) -> TeacherOutputs | None:
        """The outputs of a batch when all its examples are known, zero in padding."""
        if not keys or any(key not in self._examples for key in keys):
            return None
        examples = [self._examples[key] for key in keys]
        mask = inputs["attention_mask"].bool()
        hidden = ()
        logits = {
            name: torch.stack([e.logits[name] for e in examples]).to(mask.device)
            for name in examples[0].logits
        }
        if examples[0].hidden is not None:
            tokens = torch.cat([e.hidden for e in examples], dim=1).to(mask.device)  # type: ignore[misc]
            layers, _, features = tokens.shape
            whole = tokens.new_zeros(layers, *mask.shape, features)
            whole[:, mask] = tokens
            hidden = tuple(whole.float())
        return TeacherOutputs(logits, hidden)

    def keep(
        self, keys: list[bytes], inputs: Mapping[str, Any], outputs: TeacherOutputs
    ) -> None:
        """Remember the outputs of the examples that fit."""
        stacked = None
        tokens = inputs["attention_mask"].shape if keys else None
        for name, logits in outputs.logits.items():
            if logits.dim() != 2 or name in OVER_TOKENS or logits.shape == tokens:
                return  # one for each token: of another shape in every batch
        if keys and outputs.hidden_states and self.used < self.limit:
            stacked = torch.stack(outputs.hidden_states).half().cpu()
        mask = inputs["attention_mask"].bool().cpu() if keys else None
        for row, key in enumerate(keys):
            if key in self._examples or mask is None:
                continue
            example = _Example(
                {name: z[row].float().cpu() for name, z in outputs.logits.items()},
                None if stacked is None else stacked[:, row, mask[row]].clone(),
            )
            if self.used + example.bytes > self.limit or (
                stacked is None and outputs.hidden_states
            ):
                return
            self._examples[key] = example
            self.used += example.bytes
