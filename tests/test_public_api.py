"""The names that users rely on. A change to one of them is deliberate: it changes the list here, and the changelog."""

import inspect
import textwrap
from collections.abc import Callable, Iterator

import fastvit
from fastvit import cli

COMMANDS = [
    "attention",
    "benchmark",
    "convert",
    "demo",
    "embed",
    "evaluate",
    "export",
    "finetune",
    "info",
    "predict",
    "serve",
    "sweep",
    "tune",
    "watch",
]

API = """
Features(tokens, grid)
Features.cls_token
Features.mean
Features.patch_map
Features.patch_tokens
InputError(ValueError)
Prediction(label, score, top, probabilities, selected=())
Predictor(model, device=None, dtype=None, max_batch=32, *, image_processor=None, top_k=5, flip=False,
    max_wait_ms=0.0, workers=None, cuda_graphs=True, tune=True, runtime='auto', fast_jpeg=False)
Predictor.__call__(images, *, raise_errors=None)
Predictor.close()
Predictor.stream(images, *, raise_errors=False)
ViTConfig = transformers.ViTConfig
ViTForImageClassification(config)
ViTForImageClassification.forward(pixel_values=None, labels=None, interpolate_pos_encoding=None,
    attention_mask=None, output_attentions=None, output_hidden_states=None, **kwargs)
ViTForMaskedImageModeling(config)
ViTForMaskedImageModeling.forward(pixel_values=None, bool_masked_pos=None, interpolate_pos_encoding=None,
    attention_mask=None, output_attentions=None, output_hidden_states=None, **kwargs)
ViTModel(config, add_pooling_layer=True, use_mask_token=False)
ViTModel.forward(pixel_values=None, bool_masked_pos=None, interpolate_pos_encoding=None, attention_mask=None,
    output_attentions=None, output_hidden_states=None, class_token_only=False, num_blocks=None, **kwargs)
ViTModel.get_input_embeddings()
ViTPreTrainedModel(config, *inputs, **kwargs)
ViTPreTrainedModel.forward_features(pixel_values, *, class_token_only=False, **kwargs)
ViTPreTrainedModel.from_pretrained(pretrained_model_name_or_path, *model_args, config=None, **kwargs)
ViTPreTrainedModel.get_intermediate_layers(pixel_values, n=1, reshape=False, return_class_token=False,
    norm=True)
ViTPreTrainedModel.resize_position_embeddings(image_size)
ViTPreTrainedModel.save_pretrained(save_directory, *args, **kwargs)
backend(name)
convert(source, dest, *, to=None, num_heads=None, overwrite=False)
optimize(model)
quantize(model, kind)
register()
register_attention()
restore(model)
unregister()
"""


def format_signature(function: Callable) -> str:
    """Names, kinds and defaults of the parameters; annotations are no promise."""
    signature = inspect.signature(function)
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "self"]
    bare = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def list_api() -> Iterator[str]:
    for name in fastvit.__all__:
        value = getattr(fastvit, name)
        if not value.__module__.startswith("fastvit"):
            yield f"{name} = {value.__module__.partition('.')[0]}.{value.__name__}"
            continue
        if inspect.isclass(value) and issubclass(value, Exception):
            yield f"{name}({', '.join(base.__name__ for base in value.__bases__)})"
            continue
        yield name + format_signature(value)
        if inspect.isclass(value):
            for attribute in sorted(vars(value)):
                member = inspect.getattr_static(value, attribute)
                if attribute.startswith("_") and attribute != "__call__":
                    continue
                if isinstance(member, property):
                    yield f"{name}.{attribute}"
                elif inspect.isroutine(getattr(value, attribute)):
                    yield f"{name}.{attribute}" + format_signature(getattr(value, attribute))


def test_public_names_and_signatures_are_the_listed_ones():
    lines = [line for entry in list_api() for line in textwrap.wrap(entry, 110, subsequent_indent="    ")]
    assert lines == API.strip().splitlines()


def test_commands_are_the_listed_ones():
    assert sorted(cli.COMMANDS) == COMMANDS
