"""Tables of tensor names: ours -> those of a released checkpoint, joined along dimension 0 where there are several.

`{p}` stands for both weight and bias.
"""

from collections.abc import Iterable, Mapping

Rows = dict[str, tuple[str, ...]]
Table = Mapping[str, str | tuple[str, ...]]

BOTH = ("weight", "bias")
QWEN2_LAYER: Table = {  # Hugging Face's names
    "input_norm.weight": "input_layernorm.weight",
    "qkv.{p}": tuple(f"self_attn.{x}_proj.{{p}}" for x in "qkv"),
    "o.weight": "self_attn.o_proj.weight",
    "post_norm.weight": "post_attention_layernorm.weight",
    "gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down.weight": "mlp.down_proj.weight",
}


def rows(table: Table, ours: str = "", theirs: str = "") -> Rows:
    """The table's rows, behind these prefixes."""
    made: Rows = {}
    for name, parts in table.items():
        parts = (parts,) if isinstance(parts, str) else parts
        for p in BOTH if "{p}" in name else ("",):
            made[ours + name.format(p=p)] = tuple(theirs + part.format(p=p) for part in parts)
    return made


def depth(names: Iterable[str], prefix: str, table: Table) -> int:
    """How many blocks the names speak of: the highest index of a tensor that a block of the table has, plus one."""
    known = {name for parts in rows(table).values() for name in parts}
    found = [name.removeprefix(prefix).partition(".") for name in names if name.startswith(prefix)]
    indices = [i for i, _, rest in found if rest in known and i.isascii() and i.isdigit() and len(i) < 4]
    return 1 + max(map(int, indices), default=-1)
