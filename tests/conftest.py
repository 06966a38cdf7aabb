"""Small untrained models in folders, written by the library classes that write the real ones."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import harness
import pytest
import torch
import transformers

import rae
from nano import prepare

world = harness.world

SIZE = 32


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)  # tiny tensors; and one order of summation
    harness.start_server()


def write_encoder(folder, width: int, hidden: int, layers: int) -> None:
    """Images of 32 px -> 16 tokens of `width` channels."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
    )
    transformers.SiglipVisionModel(vision).save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    processor = transformers.SiglipImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half
    )
    processor.save_pretrained(folder)


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folder with encoder/, language-model/, rae/ and t2i/ for images of 32 px, 16 tokens of 24
    channels."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    write_encoder(folder / "encoder", width=24, hidden=32, layers=2)
    tokenizer = prepare.make_tokenizer(documents=300)
    language_model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )
    language_model.save_pretrained(folder / "language-model")
    tokenizer.save_pretrained(folder / "language-model")

    decoder = {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_width": 48}
    autoencoder = rae.RAE(str(folder / "encoder"), decoder)
    autoencoder.save_pretrained(folder / "rae")
    dit = {"width": 32, "depth": 2, "heads": 2, "condition_width": 20}
    model = rae.TextToImage(
        str(folder / "language-model"), dit, autoencoder.latent_shape, str(folder / "rae")
    )
    model.save_pretrained(folder / "t2i")
    return folder


@pytest.fixture
def plain_language_model(parts, tmp_path):
    """Folder of the language model whose tokenizer has no tokens around an image, as Qwen's."""
    folder = tmp_path / "plain-language-model"
    shutil.copytree(parts / "language-model", folder)
    for path in folder.glob("tokenizer*.json"):
        path.write_text(path.read_text().replace("<im_", "<other_"))
    return folder


@pytest.fixture
def vae_folder(tmp_path):
    """An AutoencoderKL of 6 channels and a factor of 4: (16, 24) at 32 px."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 16],
        norm_num_groups=4,
        latent_channels=6,
        sample_size=1024,
        scaling_factor=0.36,
        shift_factor=0.11,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"
