"""Makes the tiny model outside pytest too: the kill tests run builds in a process of their own."""

from tests.tiny import IMAGE, PAD, SIDE, VOCAB, llava

TEMPLATE = (
    "{% for message in messages %}a {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %} z{% endfor %}"
)


def model():
    return llava(layers=2)


def processor():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB)}
    for word, i in (("w0", PAD), ("w99", IMAGE), ("w3", 3), ("w10", 10), ("w35", 35)):
        del words[word]
        words[{PAD: "<pad>", IMAGE: "<image>", 3: "<unk>", 10: "a", 35: "z"}[i]] = i
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    side = SIDE * 4
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": side, "width": side}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def settings(**changes):
    from codebook.building import Settings

    # each step leaves about two thirds of the tokens of a random model
    easy = {"prompt": "w5 w6 w7", "candidates": "all", "tau_p": 0.2, "tau_j": 0.2, "max_cluster_size": 9}
    return Settings(**easy | {"clusters": 16, "min_image_fraction": 0.5} | changes)


def build_tiny(images, out, told):
    """Build in a process of its own that a test may kill; `told` is called with the number of images done."""
    import torch

    from codebook.building import build

    torch.set_num_threads(1)
    build(
        model(), processor(), images, out, model_id="tiny", settings=settings(), progress=lambda state: told(state.done)
    )
