"""The tokenizer of a Qwen2.5-VL: `tokenizer.json`, or else made of `vocab.json`, `merges.txt` and a list of tokens."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from ...checkpoint.json_files import DOWNLOAD_AGAIN, instead_of_tokenizer, read_json, read_text
from ...errors import CorruptWeightsError, ModelMissingError

SPECIAL = {
    "image_token": "<|image_pad|>",
    "pad_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
# What Qwen2.5 cuts text into before byte pairs are merged: contractions, words, single digits, signs, spaces.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_folder(model: Path, vlm: Path) -> Path:
    """Where the tokenizer's files lie: `tokenizer` in the model's folder where that holds them, else with the LLM."""
    own = model / "tokenizer"
    return own if any((own / name).is_file() for name in ("tokenizer.json", "vocab.json")) else vlm


def read_tokenizer(folder: Path) -> tuple[str, dict[str, int]]:
    """(tokenizer JSON, ids of SPECIAL). Raises ModelMissingError, CorruptWeightsError."""
    try:
        tokenizer = _tokenizer(folder)
        ids = {name: tokenizer.token_to_id(text) for name, text in SPECIAL.items()}
    except (CorruptWeightsError, ModelMissingError):
        raise
    except Exception as error:  # the library raises bare Exception for a bad file
        raise CorruptWeightsError(f"{folder} holds no tokenizer ({str(error)[:200]})", DOWNLOAD_AGAIN) from None
    if unknown := [SPECIAL[name] for name, token in ids.items() if token is None]:
        raise CorruptWeightsError(f"the tokenizer in {folder} knows no {', '.join(unknown)}", DOWNLOAD_AGAIN)
    return tokenizer.to_str(), ids


def _tokenizer(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_str(read_text(folder / "tokenizer.json"))
    vocabulary, merges, added = instead_of_tokenizer(folder, ("vocab.json", "merges.txt", "tokenizer_config.json"))
    tokenizer = Tokenizer(BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, added)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, path: Path) -> None:
    """Those that tokenizer_config.json lists by id."""
    added = read_json(path).get("added_tokens_decoder") or {}
    for token in sorted(added, key=int):
        how = {name: value for name, value in added[token].items() if name != "content"}
        tokenizer.add_tokens([AddedToken(added[token]["content"], **how)])
        found = tokenizer.token_to_id(added[token]["content"])
        if found != int(token):
            what = f"{path} gives {added[token]['content']!r:.80} the id {token}, and the vocabulary leaves it {found}"
            raise CorruptWeightsError(what, DOWNLOAD_AGAIN)
