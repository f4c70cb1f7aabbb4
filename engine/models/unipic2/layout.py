"""Where the pieces of a released UniPic-2 lie: a folder for each component. Code that comes with them is never read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import ModelMissingError

PAINTER = {"transformer": "transformer", "vae": "vae"}  # component -> folder
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Layout:
    """`components` and `tokenizers`, by use, are folders. `native`: as of a DeepGen, which UniPic-2 never is."""

    folder: Path
    components: Mapping[str, Path]
    tokenizers: Mapping[str, Path]
    remedies: Mapping[str, str]  # for a component that is missing; "" stands for all others
    native: None = None

    def weights(self) -> dict[str, list[Path]]:
        """The safetensors of every component. Raises ModelMissingError."""
        found = {name: sorted(folder.glob("*.safetensors")) for name, folder in self.components.items()}
        for name, paths in found.items():
            if not paths:
                what = f"{self.components[name]} holds no safetensors, and the model needs its {name}"
                raise ModelMissingError(what, self.remedies.get(name, self.remedies[""]))
        return found

    def small(self) -> dict[str, Path]:
        """The small files that say what tensors do not, by use; they may not exist."""
        return {
            **{name: folder / "config.json" for name, folder in self.components.items()},
            "scheduler": self.folder / "scheduler" / "scheduler_config.json",
            "generation": self.components.get("vlm", self.folder / "vlm") / "generation_config.json",
            **{f"{use}/{name}": place / name for use, place in self.tokenizers.items() for name in TOKENIZER_FILES},
        }

    def files(self) -> list[Path]:
        """All that a conversion reads. Raises ModelMissingError."""
        small = [path for path in self.small().values() if path.is_file()]
        return [path for paths in self.weights().values() for path in paths] + small


def place_of(folder: Path, mark: str) -> Path | None:
    """The folder, or one inside it, as some downloads nest it, that has these two: `mark` and a transformer."""
    inside = sorted(path for path in folder.glob("*/") if path.is_dir())
    wanted = ("transformer", mark)
    return next((x for x in (folder, *inside) if all((x / name).is_dir() for name in wanted)), None)


def no_release(folder: Path, mark: str, hub: str) -> ModelMissingError:
    what = f"{folder} holds no folders transformer and {mark}"
    return ModelMissingError(what, f"give the folder of a released UniPic-2, such as {hub}")
