"""Chat templates of UniPic 1.0: which text stands for which task."""

TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
IMAGE = "<image>"  # one special token, repeated for every row of image features

UNCONDITIONAL = {"generate": "Generate an image.", "inpaint": "Generate an image.", "edit": "Repeat this image."}


def turn(kind: str, text: str) -> str:
    """The prompt of a conditional row. Only an editing instruction is stripped, as the released scripts do."""
    if kind in ("generate", "inpaint"):
        return TURN.format(f"Generate an image: {text}")
    return TURN.format(f"{IMAGE}\n{text.strip() if kind == 'edit' else text}")


def unconditional_turn(kind: str, negative: str | None) -> str:
    """The prompt of an unconditional row; a negative prompt takes the place of the neutral text."""
    if negative is not None:
        return turn(kind, negative)
    text = UNCONDITIONAL[kind]
    return TURN.format(f"{IMAGE}\n{text}" if kind == "edit" else text)
