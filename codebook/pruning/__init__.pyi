from codebook.pruning.engine.enabling import disable as disable
from codebook.pruning.engine.enabling import enable as enable
from codebook.pruning.engine.memory import remember as remember
from codebook.pruning.methods import *  # noqa: F403
from codebook.pruning.schedule import Schedule as Schedule
from codebook.pruning.stage import Stage as Stage
from codebook.pruning.tokens import VisualTokens as VisualTokens
