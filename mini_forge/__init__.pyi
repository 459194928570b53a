# What `__init__.py` gives on first use, for type checkers and editors. A test holds the two together.
from mini_forge.config import TrainingConfig as TrainingConfig
from mini_forge.data import packing as packing
from mini_forge.data.batches import collate as collate
from mini_forge.data.batches import tokenize as tokenize
from mini_forge.data.chat import choose_template as choose_template
from mini_forge.data.packing import pack as pack
from mini_forge.data.tasks import load_examples as load_examples
from mini_forge.errors import CheckpointError as CheckpointError
from mini_forge.errors import ConfigError as ConfigError
from mini_forge.errors import DataError as DataError
from mini_forge.errors import TrainingError as TrainingError
from mini_forge.errors import UserError as UserError
from mini_forge.export.gguf_file import export_gguf as export_gguf
from mini_forge.inference.generate import generate as generate
from mini_forge.io.adapters import save_adapter as save_adapter
from mini_forge.io.merge import merge_adapter as merge_adapter
from mini_forge.io.models import load_model as load_model
from mini_forge.io.models import load_tokenizer as load_tokenizer
from mini_forge.model.decoder import Decoder as Decoder
from mini_forge.model.decoder import DecoderSpec as DecoderSpec
from mini_forge.model.decoder import KVCache as KVCache
from mini_forge.model.lora import LoRALinear as LoRALinear
from mini_forge.model.lora import LoraSpec as LoraSpec
from mini_forge.model.lora import disabled as disabled
from mini_forge.model.lora import inject as inject
from mini_forge.model.quant import Linear4bit as Linear4bit
from mini_forge.model.quant import Linear8bit as Linear8bit
from mini_forge.model.quant import dequantize_4bit as dequantize_4bit
from mini_forge.model.quant import quantize_4bit as quantize_4bit
from mini_forge.providers import PROVIDERS as PROVIDERS
from mini_forge.run import RunResult as RunResult
from mini_forge.run import train as train
from mini_forge.training import schedule
from mini_forge.training.kto import KTOOptions as KTOOptions
from mini_forge.training.kto import kto_loss as kto_loss
from mini_forge.training.loop import Interrupted as Interrupted
from mini_forge.training.losses import token_nll as token_nll
from mini_forge.training.ppo_math import gae as gae
from mini_forge.training.preferences import dpo_loss as dpo_loss
from mini_forge.training.schedule import lr_at as lr_at
from mini_forge.training.schedule import warmup_steps as warmup_steps
from mini_forge.training.sft import sft_loss as sft_loss

schedules = schedule
__version__: str
