"""Transformers of torch.nn with the masks that the tutorials give them, batch-first and sequence-first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow

VOCABULARY, D = 20, 8


class LanguageModel(nn.Module):
    """An encoder with a causal mask, made in the ways that people make one."""

    def __init__(self, kind: str, batch_first: bool, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 12, 0.0, batch_first=batch_first, norm_first=norm_first)
        self.kind, self.batch_first = kind, batch_first
        self.embedding, self.encoder = nn.Embedding(VOCABULARY, D), nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(D, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        tokens = tokens if self.batch_first else tokens.t()
        n = tokens.size(1) if self.batch_first else tokens.size(0)
        x = self.embedding(tokens) * D**0.5
        mask = nn.Transformer.generate_square_subsequent_mask(n).to(x)
        if self.kind == "positional":
            y = self.encoder(x, mask)
        elif self.kind == "hint":
            y = self.encoder(x, mask=mask, is_causal=True, src_key_padding_mask=padding)
        elif self.kind == "bool":
            y = self.encoder(x, mask=torch.triu(torch.ones(n, n, dtype=torch.bool), 1))
        else:
            y = self.encoder(x, src_key_padding_mask=padding)
        return self.out(y)


class Translator(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.source, self.target = nn.Embedding(VOCABULARY, D), nn.Embedding(VOCABULARY, D)
        self.transformer = nn.Transformer(D, 2, 1, 1, 12, 0.0, batch_first=batch_first)
        self.out = nn.Linear(D, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        paddings = source == 0, target == 0
        if not self.batch_first:
            source, target = source.t(), target.t()
        n = target.shape[1 if self.batch_first else 0]
        causal = (torch.triu(torch.ones(n, n)) == 1).transpose(0, 1)
        causal = causal.float().masked_fill(causal == 0, float("-inf")).masked_fill(causal == 1, 0.0).to(torch.float64)
        y = self.transformer(
            self.source(source),
            self.target(target),
            None,
            causal,
            None,
            src_key_padding_mask=paddings[0],
            tgt_key_padding_mask=paddings[1],
            memory_key_padding_mask=paddings[0],
        )
        return self.out(y)


class Decoder(nn.Module):
    def __init__(self, hint: bool) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(D, 2, 12, 0.0, batch_first=True)
        self.hint, self.embedding, self.image = hint, nn.Embedding(VOCABULARY, D), nn.Linear(5, D)
        self.decoder, self.out = nn.TransformerDecoder(layer, 2), nn.Linear(D, VOCABULARY)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.size(1)).double()
        options: dict[str, Any] = {"tgt_is_causal": True} if self.hint else {"tgt_key_padding_mask": tokens == 0}
        return self.out(self.decoder(self.embedding(tokens), self.image(image), tgt_mask=mask, **options))


def tokens(n: int, length: int) -> Tensor:
    t = torch.randint(1, VOCABULARY, (n, length))
    t[0, -2:] = 0
    return t


KINDS = ["positional", "hint", "bool", "padding"]
NETS = {
    **{
        f"{kind} first={first}": (lambda k=kind, f=first: LanguageModel(k, f))
        for kind in KINDS
        for first in (True, False)
    },
    "norm first": lambda: LanguageModel("positional", True, norm_first=True),
    "translator": lambda: Translator(False),
    "translator batch first": lambda: Translator(True),
    "decoder": lambda: Decoder(False),
    "decoder with hint": lambda: Decoder(True),
}


@pytest.mark.parametrize("name", NETS)
def test_masks_leave_the_layers_and_the_stream_free(name: str) -> None:
    torch.manual_seed(0)
    m = NETS[name]().double()

    def inputs(n: int, length: int) -> tuple[Tensor, ...]:
        if isinstance(m, LanguageModel):
            return (tokens(n, length),)
        return tokens(n, length), (tokens(n, length) if isinstance(m, Translator) else torch.randn(n, 3, 5).double())

    x = inputs(4, 5)
    widths = fxgrow.widths(fxgrow.capture(m, x))
    assert [width.name for width in widths if width.pinned is not None] == ["out"]
    wider = fxgrow.widen(m, x, {width.name: width.step for width in widths if width.pinned is None})
    for training in (True, False):
        m.train(training)
        wider.train(training)
        for given in (x, inputs(3, 7)):
            torch.testing.assert_close(wider(*given), m(*given), rtol=1e-10, atol=1e-10)
