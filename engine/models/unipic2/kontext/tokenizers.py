"""The tokenizers of CLIP and T5, from the folders of a released model: JSON text, and ids of what stands around a text.

CLIP's is `tokenizer.json`, or else made of `vocab.json` and `merges.txt`; T5's is `tokenizer.json`.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from ....checkpoint.json_files import DOWNLOAD_AGAIN, instead_of_tokenizer, read_json, read_text
from ....errors import CorruptWeightsError, ModelMissingError

START, END = "<|startoftext|>", "<|endoftext|>"  # of CLIP
T5_END, T5_PAD = "</s>", "<pad>"
# What CLIP cuts text into, in small letters, before byte pairs are merged: words, single digits, runs of signs.
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def read_clip(folder: Path) -> tuple[str, dict[str, int]]:
    """(tokenizer JSON, ids `start`, `end` and `pad`). Raises ModelMissingError, CorruptWeightsError."""
    tokenizer = _read(folder, _clip)
    told = [
        read_json(path)
        for name in ("special_tokens_map", "tokenizer_config")
        if (path := folder / f"{name}.json").is_file()
    ]
    pad = next((each["pad_token"] for each in told if each.get("pad_token")), END)
    pad = pad.get("content") if isinstance(pad, dict) else pad
    return tokenizer.to_str(), _ids(folder, tokenizer, start=START, end=END, pad=pad)


def read_t5(folder: Path) -> tuple[str, dict[str, int]]:
    """(tokenizer JSON, ids `end` and `pad`). Raises ModelMissingError, CorruptWeightsError."""
    tokenizer = _read(folder, _whole)
    return tokenizer.to_str(), _ids(folder, tokenizer, end=T5_END, pad=T5_PAD)


def _read(folder: Path, make: Any) -> Tokenizer:
    try:
        tokenizer = make(folder)
        tokenizer.no_padding()
        tokenizer.no_truncation()
    except (CorruptWeightsError, ModelMissingError):
        raise
    except Exception as error:  # the library raises bare Exception for a bad file
        raise CorruptWeightsError(f"{folder} holds no tokenizer ({str(error)[:200]})", DOWNLOAD_AGAIN) from None
    return tokenizer


def _whole(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelMissingError(f"{folder} holds no tokenizer.json", DOWNLOAD_AGAIN)
    return Tokenizer.from_str(read_text(path))


def _clip(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _whole(folder)
    parts = instead_of_tokenizer(folder, ("vocab.json", "merges.txt"))
    model = BPE.from_file(*map(str, parts), unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix="")
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    cut = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=True) for text in (START, END)])
    return tokenizer


def _ids(folder: Path, tokenizer: Tokenizer, **wanted: object) -> dict[str, int]:
    ids = {name: tokenizer.token_to_id(str(text)) for name, text in wanted.items()}
    if unknown := [f"{wanted[name]!r:.80}" for name, found in ids.items() if found is None]:
        raise CorruptWeightsError(f"the tokenizer in {folder} knows no {', '.join(unknown)}", DOWNLOAD_AGAIN)
    return ids
