"""A task of your own: a small transformer that predicts the next character of Python's standard library."""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.text import Perplexity

import hvd_train

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""The vocabulary: the token of a character is its place here."""

LENGTH = 64
"""Characters of a sample."""

WIDTH, HEADS, LAYERS = 128, 4, 3


class Block(nn.Module):
    """Attention to the characters so far, then two dense layers; each is normalised before, and added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attend(self.norm_1(x)).unflatten(2, (3, HEADS, WIDTH // HEADS))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each [B, heads, T, width of a head]
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm_2(x))))


class Transformer(nn.Module):
    """Tokens [B, T] -> logits [B, T, vocabulary], of the character that follows each; T is at most LENGTH."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)  # also the last layer
        self.positions = nn.Parameter(torch.empty(LENGTH, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens.long()) + self.positions[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.embedding.weight)


class Characters(hvd_train.Task):
    """Cross entropy of the next character, share of wrong characters, perplexity."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return Transformer(len(CHARACTERS))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        logits = model(batch["inputs"]).float()
        targets = batch["targets"].long()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), len(targets)

    def build_metrics(self, num_samples: int) -> dict[str, Metric]:
        self.perplexity = Perplexity()
        return {"perplexity": self.perplexity}

    def evaluate(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        logits = model(batch["inputs"]).float()
        self.perplexity.update(logits, batch["targets"].long())
        logits, targets = logits.flatten(0, 1), batch["targets"].long().flatten()
        n = len(targets)
        loss = F.cross_entropy(logits, targets, reduction="sum").item()
        return {"loss": (loss, n), "error": ((logits.argmax(1) != targets).sum().item(), n)}


def to_tokens(text: str) -> np.ndarray:
    """The tokens of a text; tabs become spaces, and characters outside the vocabulary `?`."""
    codes = np.frombuffer(text.expandtabs(4).encode("ascii", "replace"), np.uint8)
    codes = codes[(codes == ord("\n")) | (codes >= 32) & (codes < 127)]
    return np.where(codes == ord("\n"), 0, codes - 31).astype(np.uint8)


def write(folder: Path) -> None:
    """The sources of the standard library of this Python: every fortieth module is validation text."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    apart = set(modules[::40])
    for name, chosen in (("train", [m for m in modules if m not in apart]), ("validation", modules[::40])):
        tokens = to_tokens("\n".join(m.read_text(encoding="utf-8") for m in chosen))
        rows = (len(tokens) - 1) // LENGTH
        inputs, targets = (tokens[i : i + rows * LENGTH].reshape(rows, LENGTH) for i in (0, 1))
        np.savez(folder / f"{name}.npz", inputs=inputs, targets=targets)
        print(f"{folder / name}.npz: {rows:,} samples of {LENGTH} characters of {len(chosen)} modules")
    (folder / "vocabulary.json").write_text(json.dumps(list(CHARACTERS)))


@torch.no_grad()
def sample(model: nn.Module, prompt: str, length: int, temperature: float, seed: int) -> str:
    """`prompt`, continued by `length` characters that `model` draws."""
    tokens = torch.from_numpy(to_tokens(prompt)).long()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(length):
        logits = model(tokens[None, -LENGTH:])[0, -1].float()
        chances = torch.softmax(logits / temperature, dim=0)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)])
    return "".join(CHARACTERS[i] for i in tokens)


def perplexity(run: Path) -> float:
    """Of the validation text, by the best model of a run."""
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return float(min(e["metrics"]["perplexity"] for e in events if e["event"] == "evaluation"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="write train.npz, validation.npz and vocabulary.json")
    writing.add_argument("folder", type=Path)
    sampling = commands.add_parser("sample", help="print the perplexity of a run, and text that it makes")
    sampling.add_argument("run", type=Path)
    sampling.add_argument("--prompt", default="def ", help="at least one character")
    sampling.add_argument("--length", type=int, default=400, help="characters to add")
    sampling.add_argument("--temperature", type=float, default=0.8, help="lower: more probable characters")
    sampling.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.command == "write":
        write(given.folder)
    elif not given.prompt or given.temperature <= 0:
        sys.exit("sample: expected a --prompt of at least one character and a --temperature above 0.")
    else:
        model = hvd_train.load_model(given.run, task=Characters())
        print(f"perplexity {perplexity(given.run):.2f}", file=sys.stderr)
        print(sample(model, given.prompt, given.length, given.temperature, given.seed))


if __name__ == "__main__":
    main()
