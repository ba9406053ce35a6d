"""A recurrent language model over bytes or other small alphabets."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor, nn

from nqm.errors import check_integer, check_number

State = tuple[Tensor, Tensor]


class LSTMLanguageModel(nn.Module):
    """Embedding, LSTM, linear output.

    Parameters
    ----------
    classes : int
        Symbols of the alphabet.
    embedding : int
        Length of a symbol's vector.
    hidden : int
        Units of each LSTM layer.
    layers : int
        LSTM layers.
    dropout : float
        Rate between the layers and before the output layer.

    Raises
    ------
    NQMError
        If an option is out of range.

    Notes
    -----
    Parameters of one layer: ``s e + 4 h (e + h + 2) + s (h + 1)`` for s symbols, embeddings of
    length e and h units (PyTorch keeps two bias vectors): 1,558,730 at 205, 205 and 500.
    Initialised as PyTorch does: uniform within ``1 / sqrt(h)``, embeddings standard normal.
    """

    def __init__(
        self,
        *,
        classes: int,
        embedding: int = 205,
        hidden: int = 500,
        layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"classes": classes, "embedding": embedding, "hidden": hidden, "layers": layers}
        for name, value in sizes.items():
            check_integer(f"lstm_lm.{name}", value, 1)
        check_number("lstm_lm.dropout", dropout, low=0, high=1, closed_high=False)
        self.embedding = nn.Embedding(classes, embedding)
        # A single layer has nothing between layers, and PyTorch warns of it.
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear = nn.Linear(hidden, classes)

    @overload
    def forward(
        self, tokens: Tensor, state: State | None = None, return_state: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(
        self, tokens: Tensor, state: State | None = None, *, return_state: Literal[True]
    ) -> tuple[Tensor, State]: ...

    def forward(
        self, tokens: Tensor, state: State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """Logits of the next symbol at every position.

        Parameters
        ----------
        tokens : Tensor
            Symbols (B, L), int64.
        state : pair of Tensor, optional
            Hidden and cell state (layers, B, hidden) to start from; zeros without it.
        return_state : bool
            Also return the state after the last symbol, to carry along a long text.

        Returns
        -------
        Tensor, or Tensor and state
            Logits (B, L, classes).
        """
        outputs, state = self.lstm(self.embedding(tokens), state)
        logits: Tensor = self.linear(self.dropout(outputs))
        return (logits, state) if return_state else logits
