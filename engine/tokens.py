"""Text to token ids and back, by a folder's tokenizer.json, and to ids by others that may be beside it."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .errors import CorruptWeightsError


class Tokens:
    """A tokenizer to which one image placeholder is added as a special token, and `tokenizer_2.json` and so on."""

    def __init__(self, path: Path, image_text: str, image_token: int) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
            others = {place.stem.rpartition("_")[2]: place for place in path.parent.glob("tokenizer_[0-9].json")}
            self.others = {name: Tokenizer.from_file(str(place)) for name, place in others.items()}
        except Exception as error:  # the library raises plain Exception for anything wrong with a file
            raise CorruptWeightsError(f"cannot read {path} ({error})", "fetch or convert the model again") from error
        self.tokenizer.add_special_tokens([image_text])
        found = self.tokenizer.token_to_id(image_text)
        if found != image_token:
            raise CorruptWeightsError(
                f"{path} gives {image_text} the id {found}, the model expects {image_token}",
                "use the tokenizer that belongs to the model",
            )

    def encode(self, text: str, by: str = "") -> list[int]:
        """`by`: the number of another tokenizer."""
        tokenizer = self.others[by] if by else self.tokenizer
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not keep_special)

    def stream(self) -> "TextStream":
        return TextStream(self.tokenizer)


class TextStream:
    """Pieces of text as tokens arrive; a piece is held back until its UTF-8 bytes are complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.stream = tokenizer, DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.sent = 0  # characters

    def push(self, token: int) -> str:
        self.ids.append(token)
        piece = self.stream.step(self.tokenizer, token) or ""
        self.sent += len(piece)
        return piece

    def rest(self) -> str:
        """What is still held back when no more tokens come: bytes that never became a whole character."""
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)[self.sent :]
