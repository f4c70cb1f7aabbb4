"""Where the pieces of a released DeepGen 1.0 lie. There are two layouts; code that comes with either is never read.

As published for diffusers: the folders `transformer`, `connector`, `vae`, `vlm` (the language model, with what DeepGen
learned merged into it), and `scheduler`, `tokenizer`.

As published from training: `model.safetensors` or `model.pt` with all that was trained, and beside it `vae` and the
language model that training began with, `vlm_base` or a folder whose name begins with Qwen2.5-VL. `scheduler`,
`tokenizer` and `connector/config.json` are read where there are such. A `vlm` folder will not do, since a model that
holds the update already must not get it twice; nor do shards of an optimiser's state, which its own tools join first.
"""

from dataclasses import dataclass
from pathlib import Path

from ...errors import ModelMissingError
from .tokenizer import tokenizer_folder

RELEASED = "deepgenteam/DeepGen-1.0-diffusers"
NATIVE = ("model.safetensors", "model.pt")


@dataclass(frozen=True)
class Layout:
    folder: Path
    native: Path | None  # the trained tensors in one file, in the training code's layout

    @property
    def vlm(self) -> Path:
        """The language model: merged, or what it was before."""
        if self.native is None:
            return self.folder / "vlm"
        return _base(self.folder) or self.folder / "vlm_base"

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer's files."""
        return tokenizer_folder(self.folder, self.vlm)

    def weights(self) -> dict[str, list[Path]]:
        """The safetensors of every component that is a folder. Raises ModelMissingError."""
        folders = {"vae": self.folder / "vae", "vlm": self.vlm}
        if self.native is None:
            folders |= {name: self.folder / name for name in ("transformer", "connector")}
        found = {name: sorted(folder.glob("*.safetensors")) for name, folder in folders.items()}
        for name, paths in found.items():
            if not paths:
                raise _missing(folders[name], name, merged=self.native is None)
        return found

    def small(self) -> dict[str, Path]:
        """The small files that say what tensors do not, by use; they may not exist."""
        return {
            "vlm": self.vlm / "config.json",
            "generation": self.vlm / "generation_config.json",
            "transformer": self.folder / "transformer" / "config.json",
            "vae": self.folder / "vae" / "config.json",
            "connector": self.folder / "connector" / "config.json",
            "scheduler": self.folder / "scheduler" / "scheduler_config.json",
            "prompts": self.folder / "prompt_template.json",
            **{name: self.tokenizer / name for name in ("tokenizer.json", "vocab.json", "merges.txt")},
            "tokenizer": self.tokenizer / "tokenizer_config.json",
        }

    def files(self) -> list[Path]:
        """All that a conversion reads. Raises ModelMissingError."""
        small = [path for path in self.small().values() if path.is_file()]
        return [path for paths in self.weights().values() for path in paths] + [self.native] * bool(self.native) + small


def find(folder: Path) -> Layout | None:
    """The layout of the folder, or of one inside it, as some downloads nest it."""
    for place in (folder, *sorted(path for path in folder.glob("*/") if path.is_dir())):
        if all((place / name).is_dir() for name in ("transformer", "connector")):
            return Layout(place, None)
        native = next((place / name for name in NATIVE if (place / name).is_file()), None)
        if native and (_base(place) or (place / "vae").is_dir()):
            return Layout(place, native)
    return None


def locate(folder: Path) -> Layout:
    found = find(folder)
    if found is None:
        what = f"{folder} holds neither the folders transformer and connector nor {' or '.join(NATIVE)} beside vae"
        raise ModelMissingError(what, f"give the folder of a released DeepGen, such as {RELEASED}")
    return found


def _base(folder: Path) -> Path | None:
    named = (folder / "vlm_base", *sorted(folder.glob("Qwen2.5-VL*")))
    return next((path for path in named if path.is_dir()), None)


def _missing(folder: Path, component: str, merged: bool) -> ModelMissingError:
    what = f"{folder} holds no safetensors, and the model needs its {component}"
    if component == "vlm" and merged:
        what = f"{what}, with what DeepGen learned merged into it"
        return ModelMissingError(what, f"download vlm/ of {RELEASED}: no other Qwen2.5-VL will do")
    remedies = {
        "vlm": "put Qwen2.5-VL-3B-Instruct there",
        "vae": "put the VAE of UniPic2-SD3.5M-Kontext-2B or of Stable Diffusion 3.5 there",
    }
    return ModelMissingError(what, f"download {component}/ of {RELEASED}" if merged else remedies[component])
