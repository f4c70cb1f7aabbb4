"""The pocket model's tokenizer: one token a word of the closed vocabulary, and a few for the chat template.

Prompts are short that way: six tokens for the template of a picture, then one a word. A word from outside is <unk>.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from ..engine.models.unipic.prompts import IMAGE
from .vocabulary import vocabulary

UNKNOWN = "<unk>"
END = "<|im_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", END, IMAGE)  # the image's is last: the engine expects it there
# Fixed parts of the templates that are one token each, and what else the unconditional prompts say.
PHRASES = ("user\n", "assistant\n", "generate an image:")
WORDS = ("generate", "repeat", "this", ".")


def pocket_tokenizer() -> Tokenizer:
    """Lower-case words and signs; spaces and other line ends are dropped."""
    known = [UNKNOWN, *PHRASES, *WORDS, *vocabulary()]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(known)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    pattern = "|".join((*PHRASES, r"[a-z]+", r"\S"))
    # `removed` inverted: what matches is kept, what lies between is not.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # spaces between words, none before signs
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer
