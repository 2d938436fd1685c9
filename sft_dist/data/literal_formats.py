"""The row layouts that no chat template touches.

==========  ========================================================================================================
segments    ``segments`` of ``{"text", "train"}`` (Axolotl: ``label``), taken literally
text        ``text``: a document for continued pre-training
tokens      ``input_ids``, optional ``labels`` (-100: not trained) and masks of 0 and 1
==========  ========================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

from sft_dist.data.fields import Fields, kind, shown
from sft_dist.data.messages import Segment, Segments, TokenIds

IGNORED_LABEL = -100
# Axolotl's and others' name, and TRL's two: what any of them masks is not trained.
MASKS = ("loss_mask", "completion_mask", "assistant_masks")
LARGEST_ID = 2**31 - 1


def read_segments(row: Fields) -> Segments:
    """Raises ``RowError``: a piece does not say whether it is trained, or none with text is."""
    pieces = [_segment(piece) for piece in row.objects("segments")]
    if not any(piece.trained and piece.text for piece in pieces):
        raise row.error(
            f"segments has {len(pieces)} pieces and none to train on",
            fix="give one text and train: true, or remove the row",
        )
    return Segments(tuple(pieces), row.origin)


def _segment(piece: Fields) -> Segment:
    text, train, label = piece.text("text"), piece.flag("train"), piece.flag("label")
    if train is None and label is None:
        raise piece.error(f"{piece.where} does not say whether it is trained", fix="add train: true or false")
    if train is not None and label is not None and train != label:
        raise piece.error(f"{piece.where} has train {train} and label {label}", fix="keep one of the two")
    return Segment(text, bool(train or label))


def read_text(row: Fields) -> Segments:
    """Raises ``RowError``: there is no text."""
    text = row.text("text")
    if not text.strip():
        raise row.error("text is empty", fix="write a document, or remove the row")
    return Segments((Segment(text, True),), row.origin, is_document=True)


def read_tokens(row: Fields) -> TokenIds:
    """Raises ``RowError``: lists of other lengths or types, a label that is not its token, padding, nothing trained."""
    ids = _integers(row, "input_ids")
    if not ids:
        raise row.error("input_ids is empty or not there", fix="write the ids of the tokens, or remove the row")
    wrong = next((place for place, id in enumerate(ids) if not 0 <= id <= LARGEST_ID), None)
    if wrong is not None:
        raise row.error(f"input_ids[{wrong}] is no token's id", fix="write the ids of the model's own tokenizer")
    trained = [True] * len(ids)
    if row.values.get("labels") is not None:
        trained = [label != IGNORED_LABEL for label in _labels(row, ids)]
    for name in MASKS:
        if row.values.get(name) is not None:
            trained = [both and bit for both, bit in zip(trained, _mask(row, name, ids), strict=True)]
    if row.values.get("attention_mask") is not None and not all(_mask(row, "attention_mask", ids)):
        raise row.error("attention_mask has a 0: the row is padded", fix="write the rows without padding")
    if not any(trained[1:]):
        raise row.error(
            "no token is trained (the first one, which nothing comes before, never is)",
            fix="correct labels or the mask, or remove the row",
        )
    return TokenIds(tuple(ids), tuple(trained), row.origin)


def _labels(row: Fields, ids: Sequence[int]) -> list[int]:
    labels = _aligned(row, "labels", ids)
    for place, (label, id) in enumerate(zip(labels, ids, strict=True)):
        if label not in (IGNORED_LABEL, id):
            raise row.error(
                f"labels[{place}] is {shown(label)}, neither {IGNORED_LABEL} nor the token itself, {id}",
                fix="write each token's own id as its label; they are not shifted here",
            )
    return labels


def _mask(row: Fields, name: str, ids: Sequence[int]) -> list[bool]:
    bits = _aligned(row, name, ids, types=(int, bool))
    wrong = next((place for place, bit in enumerate(bits) if bit not in (0, 1)), None)
    if wrong is not None:
        raise row.error(f"{name}[{wrong}] is neither 0 nor 1", fix="write 1 where a token counts and 0 elsewhere")
    return [bit == 1 for bit in bits]


def _aligned(row: Fields, name: str, ids: Sequence[int], *, types: tuple[type, ...] = (int,)) -> list[int]:
    values = _integers(row, name, types=types)
    if len(values) != len(ids):
        raise row.error(
            f"{name} has {len(values)} elements and input_ids has {len(ids)}", fix="write one element for each token"
        )
    return values


def _integers(row: Fields, name: str, *, types: tuple[type, ...] = (int,)) -> list[int]:
    values = row.items(name)
    for place, value in enumerate(values):
        if type(value) not in types:
            raise row.error(f"{name}[{place}] is {_named(value)}, not an integer", fix=f"write {name} as integers")
    return values


def _named(value: object) -> str:
    return "a number with a decimal point" if isinstance(value, float) else kind(value)
