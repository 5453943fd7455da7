"""Reads selected parts of tokenizer.json: the token ids, the added tokens, and the settings that affect tokenisation.

The JSON decoder decodes only the fields that a schema names, and skips all other fields of the file without creating
Python objects. Because the other fields are skipped, reading a vocabulary of 262,144 tokens needs less memory than
merging adapters. Before the decoder creates Python objects, ttexport checks that the number of objects is within a
limit.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final
from weakref import WeakValueDictionary

import msgspec

from exporter.errors import UnreadableFile, reading
from exporter.io.files import read_file
from exporter.io.json_objects import parse_object

#: Limits against hostile files, whose bytes could become many times as many bytes of objects. The limits are twice the
#: number of tokens of the largest known vocabulary and four times its text, which may take four bytes per character.
_MAX_TOKENS: Final = 1 << 19
_MAX_VOCAB_BYTES: Final = 32 << 20
#: Limit on the commas in the merges. A merge is a pair with one comma inside the pair and one comma after the pair. The
#: longest known list has 580,000 merges.
_MAX_MERGE_COMMAS: Final = 3 << 19
#: Commas are counted in copies of this size, because a memoryview cannot count, and a copy of the whole text would
#: double the memory.
_COUNTED_BYTES: Final = 1 << 18
_Id = Annotated[int, msgspec.Meta(ge=0)]
_ABSENT: Final = msgspec.Raw(b"null")


class _Piece(msgspec.Struct, array_like=True, gc=False):
    """The schema of a pair [piece, score] in a unigram vocabulary.

    Neither piece nor score is decoded, because the pairs are only counted.
    """


class _Numbered(msgspec.Struct, gc=False):
    id: _Id


class _Token(msgspec.Struct, gc=False):
    id: int
    content: str


class _Model(msgspec.Struct):
    """Schema of the field ``model``: settings of the tokenizer model, the vocabulary and the merges."""

    type: msgspec.Raw = _ABSENT
    byte_fallback: msgspec.Raw = _ABSENT
    unk_id: msgspec.Raw = _ABSENT
    unk_token: msgspec.Raw = _ABSENT
    dropout: msgspec.Raw = _ABSENT
    continuing_subword_prefix: msgspec.Raw = _ABSENT
    end_of_word_suffix: msgspec.Raw = _ABSENT
    ignore_merges: msgspec.Raw = _ABSENT
    vocab: msgspec.Raw = _ABSENT
    merges: msgspec.Raw = _ABSENT


class _File(msgspec.Struct):
    model: msgspec.Raw = _ABSENT
    added_tokens: msgspec.Raw = _ABSENT
    normalizer: msgspec.Raw = _ABSENT
    pre_tokenizer: msgspec.Raw = _ABSENT
    post_processor: msgspec.Raw = _ABSENT


class Tokenizer:
    """The contents of a tokenizer.json file, decoded on demand. Decoded parts are cached as long as the object exists.

    If a ``Tokenizer`` of the file exists already, ``open`` returns that object, so that all readers of the file share
    one decoded vocabulary.
    """

    def __init__(self, path: Path) -> None:
        """Raises UnreadableFile if ``path`` is not a tokenizer.json file of the tokenizers library."""
        self.path = path
        text = read_file(path)
        try:
            self._file = msgspec.json.decode(text, type=_File)
        except (ValueError, RecursionError) as exc:
            raise UnreadableFile(
                path, f"expected the tokenizer.json format of the tokenizers library, found another format ({exc})"
            ) from exc

    @classmethod
    def open(cls, path: Path) -> Tokenizer:
        """Return the existing ``Tokenizer`` of ``path`` if the file has not changed, else a new ``Tokenizer``.

        Raises UnreadableFile.
        """
        with reading(path):
            status = path.stat()
        state = (path, status.st_ino, status.st_size, status.st_mtime_ns)
        if (tokenizer := _opened.get(state)) is None:
            tokenizer = _opened[state] = cls(path)
        return tokenizer

    @cached_property
    def ids(self) -> set[int]:
        """Return the ids of all tokens, including the added tokens.

        Peak memory: the size of the file plus the decoded vocabulary.
        """
        vocab = self._vocab
        added = _decode_counted(self.path, self._file.added_tokens, "added_tokens", list[_Numbered] | None) or []
        # a unigram vocabulary is in the order of its ids
        return set(vocab.values() if isinstance(vocab, dict) else range(len(vocab))) | {token.id for token in added}

    @cached_property
    def added(self) -> dict[str, int]:
        """Map the text of every added token to the token's id."""
        added = _decode_counted(self.path, self._file.added_tokens, "added_tokens", list[_Token] | None) or []
        return {token.content: token.id for token in added}

    def texts_from(self, first: int) -> dict[int, str]:
        """Map the ids from ``first`` on to the texts of their tokens, in ascending order of the ids."""
        vocab, added = self._vocab, {token_id: text for text, token_id in self.added.items()}
        texts = {token_id: text for text, token_id in vocab.items()} if isinstance(vocab, dict) else {}
        return {number: added.get(number, texts.get(number, "")) for number in sorted(self.ids) if number >= first}

    @cached_property
    def content(self) -> dict[str, Any]:
        """Return the fields of tokenizer.json that affect tokenisation, without fields that are null or absent.

        The field ``model.vocab`` maps each token to its id or, for a unigram model, is a list of pairs [piece, score].
        The field ``model.merges`` is a list of pairs of strings or a list of strings. Raises UnreadableFile.
        """
        path, model = self.path, self._model
        content = _small(path, self._file, "normalizer", "pre_tokenizer", "post_processor", "added_tokens")
        settings = _small(path, model, *(set(_Model.__struct_fields__) - {"vocab", "merges"}))
        settings["vocab"] = None
        if model.vocab != _ABSENT:
            table = isinstance(self._vocab, dict)
            settings["vocab"] = self._vocab if table else _decode(path, model.vocab, "model.vocab", list[Any])
        if model.merges != _ABSENT:
            settings["merges"] = _merges(path, model.merges)
        return {**content, "model": settings}

    @cached_property
    def _model(self) -> _Model:
        model: _Model = _decode(self.path, self._file.model, "model", _Model)
        return model

    @cached_property
    def _vocab(self) -> dict[str, int] | list[_Piece]:
        vocab: dict[str, int] | list[_Piece]
        vocab = _decode_counted(self.path, self._model.vocab, "model.vocab", dict[str, _Id] | list[_Piece])
        return vocab


_opened: WeakValueDictionary[tuple[Path, int, int, int], Tokenizer] = WeakValueDictionary()


def token_ids(path: Path) -> set[int]:
    """Return the ids of all tokens in the tokenizer file ``path``."""
    return Tokenizer.open(path).ids


def added_tokens(path: Path) -> dict[str, int]:
    """Map the text of every added token in the tokenizer file ``path`` to the token's id."""
    return Tokenizer.open(path).added


def read_tokenizer(path: Path) -> dict[str, Any]:
    """Return the fields of the tokenizer file ``path`` that affect tokenisation."""
    return Tokenizer.open(path).content


def read_vocabulary(path: Path) -> dict[str, int]:
    """Map each token of the file vocab.json at ``path`` to the token's id. Raises UnreadableFile."""
    vocab: dict[str, int] = _decode_counted(path, msgspec.Raw(read_file(path)), path.name, dict[str, _Id])
    return vocab


def _small(path: Path, struct: msgspec.Struct, *names: str) -> dict[str, Any]:
    """Decode the JSON fields ``names``.

    The fields are decoded without a schema, because the limits of ``parse_object`` bound the memory.
    """
    present = {name: raw for name in names if (raw := getattr(struct, name)) != _ABSENT}
    return {name: parse_object(path, b'{"": ' + bytes(raw) + b"}", what=name)[""] for name, raw in present.items()}


def _merges(path: Path, raw: msgspec.Raw) -> Any:
    """Decode the list of BPE merges.

    Older tokenizer.json files store each merge as a string, and newer files store each merge as a pair of strings.
    """
    try:
        return _decode_counted(path, raw, "model.merges", list[tuple[str, str]], _MAX_MERGE_COMMAS)
    except _WrongType:
        return _decode_counted(path, raw, "model.merges", list[str], _MAX_MERGE_COMMAS)


class _WrongType(UnreadableFile):
    """Raised if a JSON document is valid, but a value has a type other than the type in the schema."""


def _decode_counted(path: Path, raw: msgspec.Raw, what: str, schema: Any, max_commas: int = _MAX_TOKENS) -> Any:
    """Decode ``raw`` by ``schema``.

    Before decoding, the function counts the commas in ``raw`` as an upper limit on the number of items, and raises
    UnreadableFile if there are more than ``max_commas``.
    """
    view = memoryview(raw)
    if view.nbytes > _MAX_VOCAB_BYTES:
        raise UnreadableFile(path, f"{what}: expected at most {_MAX_VOCAB_BYTES} bytes, found {view.nbytes}")
    if (
        sum(bytes(view[at : at + _COUNTED_BYTES]).count(b",") for at in range(0, view.nbytes, _COUNTED_BYTES))
        > max_commas
    ):
        raise UnreadableFile(path, f"{what}: expected at most {max_commas} items, found more items")
    return _decode(path, raw, what, schema)


def _decode(path: Path, raw: msgspec.Raw, what: str, schema: Any) -> Any:
    try:
        return msgspec.json.decode(raw, type=schema)
    except msgspec.ValidationError as exc:
        raise _WrongType(path, f"{what}: {exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise UnreadableFile(path, f"{what}: {exc}") from exc
