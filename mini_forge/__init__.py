"""mini_forge: LoRA and QLoRA fine-tuning in plain PyTorch.

    config = mini_forge.TrainingConfig.from_file("config.json", output_dir="runs/x")
    result = mini_forge.train(config)
    model  = mini_forge.load_model("runs/x")

Names are imported on first use, so `import mini_forge` costs no torch.
"""

from importlib import import_module

from mini_forge.quick_imports import quick_imports

__version__ = "0.1.0"

_WHERE = {
    "TrainingConfig": "config",
    "UserError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "CheckpointError": "errors",
    "TrainingError": "errors",
    "Interrupted": "training.loop",
    "train": "run",
    "RunResult": "run",
    "load_model": "io.models",
    "merge_adapter": "io.merge",
    "export_gguf": "export.gguf_file",
    "load_tokenizer": "io.models",
    "pack": "data.packing",
    "collate": "data.batches",
    "Decoder": "model.decoder",
    "DecoderSpec": "model.decoder",
    "KVCache": "model.decoder",
    "LoRALinear": "model.lora",
    "LoraSpec": "model.lora",
    "inject": "model.lora",
    "disabled": "model.lora",
    "Linear4bit": "model.quant",
    "Linear8bit": "model.quant",
    "quantize_4bit": "model.quant",
    "dequantize_4bit": "model.quant",
    "generate": "inference.generate",
    "load_examples": "data.tasks",
    "choose_template": "data.chat",
    "tokenize": "data.batches",
    "PROVIDERS": "providers",
    "save_adapter": "io.adapters",
    "token_nll": "training.losses",
    "sft_loss": "training.sft",
    "dpo_loss": "training.preferences",
    "kto_loss": "training.kto",
    "KTOOptions": "training.kto",
    "gae": "training.ppo_math",
    "lr_at": "training.schedule",
    "warmup_steps": "training.schedule",
}

_MODULES = {"packing": "data.packing", "schedules": "training.schedule"}

__all__ = ["__version__", *_WHERE, *_MODULES]  # noqa: PLE0604


def __getattr__(name: str):
    if name not in _MODULES and name not in _WHERE:
        raise AttributeError(f"module 'mini_forge' has no attribute {name!r}")
    with quick_imports():
        module = import_module(f"mini_forge.{_MODULES.get(name) or _WHERE[name]}")
    return module if name in _MODULES else getattr(module, name)


def __dir__():
    return sorted(__all__)
