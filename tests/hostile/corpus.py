"""The corpus of bad inputs: what strangers could send as a model, and what a person could ask of one. Each is small."""

from .files import FILES
from .models import MODELS
from .others import OTHERS
from .texts import TEXTS

CASES = [*FILES, *MODELS, *TEXTS, *OTHERS]
