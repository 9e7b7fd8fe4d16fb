"""Checkpoint conversion between the native format and foreign ones: state dicts in, state dicts out, no model code.

    checkpoint = read_checkpoint("folder-or-file")     # safe: nothing in the file is executed
    weights = to_native(checkpoint.state_dict)
    config = to_native_config(checkpoint.config, checkpoint.preprocessor)
    write_checkpoint("native-folder", weights, config)

Command line: ``python -m weights_convert SRC DST [--to native|hf]``.
"""

from weights_convert.checkpoints import Checkpoint, read_checkpoint, read_config, read_state_dict, write_checkpoint
from weights_convert.configs import hf_config_from_native, native_config_from_hf, to_native_config
from weights_convert.convert import Translation, detect_format, from_native, import_state_dict, to_native
from weights_convert.errors import CheckpointError, ConversionError, naming
from weights_convert.staging import staged_folder
from weights_convert.torch_files import read_torch_file

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ConversionError",
    "Translation",
    "detect_format",
    "from_native",
    "hf_config_from_native",
    "import_state_dict",
    "naming",
    "native_config_from_hf",
    "read_checkpoint",
    "read_config",
    "read_state_dict",
    "read_torch_file",
    "staged_folder",
    "to_native",
    "to_native_config",
    "write_checkpoint",
]
