"""A released UniPic2-SD3.5M-Kontext: the folders transformer, vae, scheduler, and an encoder and a tokenizer of each
of CLIP-L, CLIP-G and T5. Tensors of the encoders keep their names.
"""

from collections.abc import Container
from pathlib import Path
from typing import Any

from ....checkpoint import tables
from ...deepgen import keys
from ...deepgen import released as deepgen
from ...deepgen.released_config import SIZES, painter, read_small
from ..layout import PAINTER, Layout, no_release, place_of
from .config import CLIPS, ENCODERS, RELEASED, KontextConfig
from .tokenizers import read_clip, read_t5

HUB, MARK = "Skywork/UniPic2-SD3.5M-Kontext-2B", "text_encoder_3"
ENDS = {"clip_l": "", "clip_g": "_2", "t5": "_3"}  # of the names of folders, and of our tokenizers
# What T5's stack is called in a file, and its table of words.
T5_STACK, T5_TABLE = "t5.encoder.", ("t5.embed_tokens.weight", "t5.shared.weight")
# Positions 0, 1, 2 ... which old files hold; the table of words under its other name.
UNUSED = (*(f"{name}.text_model.embeddings.position_ids" for name in CLIPS), "t5.encoder.embed_tokens.weight")
ACTIVATIONS = {"quick_gelu": True, "gelu": False}
Json = dict[str, Any]


class Released(deepgen.Released):
    sizes = (
        *(name for name in SIZES if name.startswith("transformer.")),
        *(f"{name}.text_model.embeddings.{kind}_embedding.weight" for name in CLIPS for kind in ("token", "position")),
        *(f"{name}.text_projection.weight" for name in CLIPS),
        T5_TABLE[1],
    )
    unused = UNUSED

    def locate(self, folder: Path) -> Layout:
        return locate(folder)

    def read_tokenizers(self, found: Layout) -> tuple[dict[str, str], dict[str, Any]]:
        texts, ids = {}, {}
        for name in ENCODERS:
            read = read_clip if name in CLIPS else read_t5
            texts[f"tokenizer{ENDS[name]}.json"], ids[name] = read(found.tokenizers[name])
        return texts, ids

    def read_config(self, found: Layout, shapes: deepgen.Shapes, ids: dict[str, Any]) -> KontextConfig:
        told = read_small(found.small())
        encoders = {name: _clip(told.get(name, {}), name, shapes) | ids[name] for name in CLIPS}
        encoders["t5"] = _t5(told.get("t5", {}), shapes) | ids["t5"]
        defaults = {name: getattr(RELEASED, name) for name in ("resolution", "rounds", "guidance")}
        return KontextConfig.from_json({**encoders, **painter(told, shapes), **defaults})

    def table(self, records: Container[str]) -> keys.Rows:
        made = keys.painter(self.config.dit, self.config.vae)
        ours = [name for name in self.expected() if name.partition(".")[0] in ENCODERS]
        return made | {name: (released_name(name),) for name in ours}

    def expected(self) -> dict[str, tuple[int, ...]]:
        from .model import build

        return deepgen.shapes_of(build, self.config)


def released_name(name: str) -> str:
    """Of a tensor of ours in an encoder."""
    if name == T5_TABLE[0]:
        return T5_TABLE[1]
    return name.replace("t5.", T5_STACK, 1) if name.startswith("t5.") else name


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
    components = {name: place / path for name, path in PAINTER.items()}
    components |= {name: place / f"text_encoder{end}" for name, end in ENDS.items()}
    tokenizers = {name: place / f"tokenizer{end}" for name, end in ENDS.items()}
    return Layout(place, components, tokenizers, {"": f"download {HUB} again"})


def _clip(told: Json, name: str, shape: deepgen.Shapes) -> Json:
    (vocab, width), (positions, _), (pooled, _) = (
        shape[f"{name}.{part}.weight"]
        for part in (
            "text_model.embeddings.token_embedding",
            "text_model.embeddings.position_embedding",
            "text_projection",
        )
    )
    activation = told.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"the activation of {name} is {activation!r:.40}, which is none of {', '.join(ACTIVATIONS)}")
    layer = f"{name}.text_model.encoder.layers."
    return {
        "vocab": vocab,
        "width": width,
        "layers": tables.depth(shape, layer, {"mlp.fc1.weight": "mlp.fc1.weight"}),
        "heads": told.get("num_attention_heads"),
        "mlp": shape[f"{layer}0.mlp.fc1.weight"][0],
        "positions": positions,
        "pooled": pooled,
        "quick": ACTIVATIONS[activation],
        "eps": told.get("layer_norm_eps", 1e-5),
    }


def _t5(told: Json, shape: deepgen.Shapes) -> Json:
    vocab, width = shape[T5_TABLE[1]]
    if (kind := told.get("feed_forward_proj")) != "gated-gelu":
        raise ValueError(f"T5's MLP is {kind!r:.40}, which is not 'gated-gelu'")
    return {
        "vocab": vocab,
        "width": width,
        "layers": told.get("num_layers"),
        "heads": told.get("num_heads"),
        "head_dim": told.get("d_kv"),
        "mlp": told.get("d_ff"),
        "buckets": told.get("relative_attention_num_buckets", 32),
        "distance": told.get("relative_attention_max_distance", 128),
        "eps": told.get("layer_norm_epsilon", 1e-6),
        "positions": RELEASED.t5.positions,
    }
