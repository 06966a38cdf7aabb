"""What the server that harness.py forks runs from imports and sets up once."""
# ruff: noqa: F401

import datasets
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers.models.auto.modeling_auto
import transformers.models.qwen2.modeling_qwen2
import transformers.models.siglip.modeling_siglip
import transformers.tokenization_utils_tokenizers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import nano.shapes
import train_decoder
import train_t2i

get_checkpoint_conversion_mapping("qwen2")  # builds the table of all models
