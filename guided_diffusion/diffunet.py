"""DiffUNet."""
from .config import flags_of  # noqa
FLAGS = {
    "diffunet": {"num_channels": 128, "num_res_blocks": 1},
    "diffunet_large": {"num_channels": 256, "num_res_blocks": 2},
}
