"""Makes pocket.png, the README's strip: a prompt, its reveal, an edit and an answer of the pocket model.

python docs/strip.py
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from unipic_run import Engine
from unipic_run.engine.outcome import Event

PROMPT = "two blue stars above a red circle"
EDIT = "add a small green square in the middle"
QUESTION = "how many stars are there?"
SEED, EDIT_SEED = 1, 1
PREVIEWS = 3
SIDE, GAP, CAPTION = 160, 12, 64  # pixels
FONT = ImageFont.load_default(14)


def main() -> None:
    with Engine.from_pretrained("pocket") as engine:
        cells = reveal(engine)
        changed = engine.edit(cells[-1][0], EDIT, seed=EDIT_SEED).images[0]
        answer = engine.ask(changed, QUESTION).text
    save([*cells, (changed, f'edit: "{EDIT}"'), (changed, f'ask: "{QUESTION}"\n{answer}')])


def reveal(engine: Engine) -> list[tuple[Image.Image, str]]:
    """The half-revealed pictures and the finished one, with captions."""
    cells: list[tuple[Image.Image, str]] = []

    def keep(event: Event) -> None:
        cells.extend((preview, f"round {event.round} of {event.rounds}") for preview in event.previews)

    rounds = engine.config.rounds
    made = engine.generate(PROMPT, seed=SEED, preview_every=max(1, rounds // (PREVIEWS + 1)), on_event=keep)
    return [*cells[:PREVIEWS], (made.images[0], f'gen: "{PROMPT}"')]


def save(cells: list[tuple[Image.Image, str]]) -> None:
    strip = Image.new("RGB", (len(cells) * (SIDE + GAP) - GAP, SIDE + CAPTION), "white")
    draw = ImageDraw.Draw(strip)
    for i, (picture, caption) in enumerate(cells):
        x = i * (SIDE + GAP)
        strip.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, 0))
        draw.multiline_text((x, SIDE + 6), wrapped(caption), fill="black", font=FONT)
    strip.save(Path(__file__).with_name("pocket.png"), optimize=True)


def wrapped(caption: str) -> str:
    """Broken where a line would be wider than its picture."""
    lines = [""]
    for word in caption.replace("\n", " \n ").split(" "):
        longer = f"{lines[-1]} {word}".strip(" ")
        if word == "\n" or FONT.getlength(longer) > SIDE:
            lines.append(word.strip("\n"))
        else:
            lines[-1] = longer
    return "\n".join(lines)


if __name__ == "__main__":
    main()
