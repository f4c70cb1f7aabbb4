"""The released UniPic 1.0 folder, read as it is: configuration, tokenizer, and tensors under our names."""

from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import torch

from ...checkpoint.differences import refuse, refuse_differences
from ...checkpoint.json_files import DOWNLOAD_AGAIN
from ...checkpoint.parts import ReleasedTensor, Stored, joined
from ...checkpoint.pickle_reader import TorchCheckpoint
from ...errors import CorruptWeightsError, ModelMissingError
from . import keys
from .config import UniPicConfig
from .released_config import SIZES, VAE_WIDTHS, read_config, read_layers, read_tokenizer

WEIGHTS, VAE_WEIGHTS = "pytorch_model.bin", "kl16.ckpt"
_VAE_SIZES = ("vae.encoder.conv_in.weight", "vae.post_quant_conv.weight", *VAE_WIDTHS)  # they tell the VAE's sizes
Records = dict[str, Stored]  # by released name


class Released:
    """An open released folder: `config`, `tensors` by our name, `tokenizers` as JSON text by file. A context manager.

    `ignored` lists the released tensors that have no place in the model, besides those that are known to be of no use.
    """

    untuned: ClassVar[dict[str, ReleasedTensor]] = {}  # nothing in this layout is an update of something else

    def __init__(self, folder: Path) -> None:
        self.folder = locate(folder)
        self.files = _files(self.folder)
        llm_folder = qwen_folder(self.folder)
        with ExitStack() as stack:
            records = _records(self.folder, stack)
            tokenizer, image_token, eos_token = read_tokenizer(llm_folder / "tokenizer.json")
            self.tokenizers = {"tokenizer.json": tokenizer}
            try:
                parts = _parts(records, read_layers(llm_folder))
                shapes = {name: record.shape for name, record in records.items()}
                self.config = read_config(self.folder, llm_folder, shapes, image_token, eos_token)
                expected = _expected(self.config)
            except ValueError as error:
                raise CorruptWeightsError(f"{folder}: {error}", DOWNLOAD_AGAIN) from None
            except (KeyError, IndexError, TypeError, ArithmeticError, RuntimeError) as error:
                what = f"{folder}: the sizes do not fit together ({error!r:.200})"
                raise CorruptWeightsError(what, DOWNLOAD_AGAIN) from None
            parts = {ours: names for ours, names in parts.items() if ours in expected or not ours.startswith("vae_")}
            used = {name for names in parts.values() for name in names}
            self.ignored = [name for name in records if name not in used]
            self.tensors = {ours: joined(ours, [records[name] for name in names]) for ours, names in parts.items()}
            refuse_differences(expected, {name: t.shape for name, t in self.tensors.items()}, str(folder))
            self._stack = stack.pop_all()

    def __enter__(self) -> "Released":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def is_released(folder: Path) -> bool:
    """Whether the folder, or a sub-folder of it, holds a released checkpoint."""
    return _find(folder) is not None


def locate(folder: Path) -> Path:
    """The folder that holds `pytorch_model.bin`: the one given, or a sub-folder, as some downloads nest it."""
    found = _find(folder)
    if found is None:
        raise ModelMissingError(f"{folder} holds no {WEIGHTS}", "give the folder of the released UniPic checkpoint")
    return found


def files(folder: Path) -> list[Path]:
    """The files of a released folder that a conversion reads."""
    return _files(locate(folder))


def qwen_folder(folder: Path) -> Path:
    found = next((f.parent for f in sorted(folder.glob("Qwen*/config.json"))), None)
    if found is None:
        raise ModelMissingError(f"{folder} holds no Qwen2.5-1.5B-Instruct/config.json", DOWNLOAD_AGAIN)
    if not (found / "tokenizer.json").is_file():
        raise ModelMissingError(f"{found} holds no tokenizer.json", "add the file from the Qwen2.5-1.5B-Instruct model")
    return found


def _find(folder: Path) -> Path | None:
    nested = sorted(path.parent for path in folder.glob(f"*/{WEIGHTS}"))
    found = [path for path in (folder, folder / "checkpoint", *nested) if (path / WEIGHTS).is_file()]
    # The language model's own folder may hold a file of that name too.
    return next((path for path in found if (path / VAE_WEIGHTS).exists()), found[0] if found else None)


def _files(folder: Path) -> list[Path]:
    llm = qwen_folder(folder)
    wanted = [folder / name for name in (WEIGHTS, VAE_WEIGHTS, SIZES)]
    wanted += [llm / name for name in ("config.json", "generation_config.json", "tokenizer.json")]
    return [path for path in wanted if path.is_file()]


def _records(folder: Path, stack: ExitStack) -> Records:
    """All records by released name, the VAE's under `vae.`; those in the main file win."""
    main = stack.enter_context(TorchCheckpoint(folder / WEIGHTS))
    records: Records = {}
    if (folder / VAE_WEIGHTS).is_file():
        vae = stack.enter_context(TorchCheckpoint(folder / VAE_WEIGHTS))
        records = {f"vae.{name}": Stored(vae, record) for name, record in vae.records.items()}
    elif not any(name.startswith("vae.") for name in main.records):
        raise ModelMissingError(f"{folder} holds no {VAE_WEIGHTS}", DOWNLOAD_AGAIN)
    records |= {name: Stored(main, record) for name, record in main.records.items()}
    return {name: found for name, found in records.items() if not keys.is_ignored(name)}


def _parts(records: Records, llm_layers: int) -> dict[str, tuple[str, ...]]:
    """Our name -> released names, the VAE's not checked yet.

    Raises one error for all names that are missing, and for layers that the language model's config.json denies.
    """
    depth = {stack: max(1, keys.depth(records, stack)) for stack in keys.STACKS}
    blocks = (depth["encoder"], depth["decoder"], depth["head"])
    rows = keys.table(llm_layers, *blocks)
    denied = {name for names in keys.table(max(llm_layers, depth["llm"]), *blocks).values() for name in names}
    for name in records:
        ours = keys.vae_name(name.removeprefix("vae.")) if name.startswith("vae.") else None
        if ours is not None:
            rows[ours] = (name,)
    used = {name for names in rows.values() for name in names}
    refuse(
        "the checkpoint",
        missing=[name for name in sorted(used | {*_VAE_SIZES}) if name not in records],
        unexpected=[name for name in records if name in denied - used],
    )
    return rows


def _expected(config: UniPicConfig) -> dict[str, tuple[int, ...]]:
    from .model import build  # the verbs' module is heavy, and only a conversion needs it here

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
