"""A released UniPic2-MetaQuery: the folders transformer, vae, scheduler and conditioner, and the language model.

Qwen2.5-VL-7B-Instruct comes apart from it: it is looked for in `vlm`, or a folder whose name begins with Qwen2.5-VL.
"""

from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...deepgen import keys
from ...deepgen import released as deepgen
from ...deepgen.config import DeepGenConfig
from ...deepgen.released_config import read_config
from ...deepgen.tokenizer import read_tokenizer, tokenizer_folder
from ..layout import PAINTER, Layout, no_release, place_of
from .config import GUIDANCE

HUB, MARK, VLM = "Skywork/UniPic2-Metaquery-9B", "conditioner", "Qwen/Qwen2.5-VL-7B-Instruct"
OUTPUT, TABLE = "vlm.lm_head.weight", "vlm.model.embed_tokens.weight"


class Released(deepgen.Released):
    def locate(self, folder: Path) -> Layout:
        return locate(folder)

    def read_tokenizers(self, found: Layout) -> tuple[dict[str, str], dict[str, Any]]:
        tokenizer, ids = read_tokenizer(found.tokenizers["tokenizer"])
        return {"tokenizer.json": tokenizer}, ids

    def read_config(self, found: Layout, shapes: deepgen.Shapes, ids: dict[str, Any]) -> DeepGenConfig:
        return replace(read_config(found, shapes, ids, taps=False), guidance=GUIDANCE)

    def table(self, records: Container[str]) -> keys.Rows:
        return keys.table(self.config) | {"lm_head.weight": (OUTPUT if OUTPUT in records else TABLE,)}

    def expected(self) -> dict[str, tuple[int, ...]]:
        from .model import build

        return deepgen.shapes_of(build, self.config)


def is_released(folder: Path) -> bool:
    """Whether the folder, or a sub-folder of it, holds a released checkpoint."""
    return place_of(folder, MARK) is not None


def files(folder: Path) -> list[Path]:
    """The files of a released folder that a conversion reads."""
    return locate(folder).files()


def locate(folder: Path) -> Layout:
    """Raises ModelMissingError."""
    place = place_of(folder, MARK)
    if place is None:
        raise no_release(folder, MARK, HUB)
    vlm = next((path for path in (place / "vlm", *sorted(place.glob("Qwen2.5-VL*"))) if path.is_dir()), place / "vlm")
    components = {name: place / path for name, path in PAINTER.items()} | {"connector": place / MARK, "vlm": vlm}
    remedies = {"": f"download {HUB} again", "vlm": f"download {VLM} into that folder: it comes apart from {HUB}"}
    return Layout(place, components, {"tokenizer": tokenizer_folder(place, vlm)}, remedies)
