"""The shape of a student, relative to the model it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tinyclip.common.schema import Positive, Strict
from tinyclip.model.config import Activation, CLIPConfig, ImageSize, ResNetConfig


def _named(value: Any) -> Any:
    return CLIPConfig.named(value) if isinstance(value, str) else value


Shape = Annotated[CLIPConfig | None, BeforeValidator(_named)]
StageLayers = tuple[Positive, Positive, Positive, Positive]


class TowerShape(Strict):
    """What to change in a tower; omitted keys stay as in the model it starts from."""

    layers: Positive | None = Field(None, description="number of blocks")
    width: Positive | None = Field(None, description="channels of the residual stream")
    heads: Positive | None = Field(None, description="heads per block; default: width // head_dim when width changes")
    mlp_width: Positive | None = Field(None, description="neurons per block; default: scaled with width")


class VisionShape(TowerShape):
    layers: Positive | StageLayers | None = Field(  # type: ignore[assignment]
        None, description="number of blocks; for a ResNet four numbers, one per stage"
    )
    width: Positive | None = Field(
        None,
        description="channels of the residual stream; for a ResNet, of its first bottleneck; the rest scale with it",
    )
    image_size: ImageSize | None = Field(None, description="image side in pixels; position embeddings are interpolated")


class TextShape(TowerShape):
    context_length: Positive | None = Field(None, description="longest text, tokens")


class StudentShape(Strict):
    """The student relative to the model it starts from."""

    like: Shape = Field(None, description="a full config or the name of a known model; excludes the other keys")
    embed_dim: Positive | None = Field(None, description="size of the shared embedding")
    vision: VisionShape = Field(VisionShape(), description="image tower")
    text: TextShape = Field(TextShape(), description="text tower")
    activation: Activation | None = Field(None, description="gelu or quick_gelu; default: the teacher's")

    def apply(self, base: CLIPConfig) -> CLIPConfig:
        """The whole config; `ValueError` when the base has unequal blocks or another family."""
        if self.like is not None:
            if self != StudentShape(like=self.like):
                raise ValueError("student.like: excludes every other key of the shape")
            return self.like
        data = base.model_dump()
        data["embed_dim"] = self.embed_dim or base.embed_dim
        data["activation"] = self.activation or base.activation
        if isinstance(base.vision, ResNetConfig):
            data["vision"] |= _resnet(self.vision, data["vision"])
        else:
            data["vision"] |= _tower(self.vision, data["vision"], "vision")
        data["text"] |= _tower(self.text, data["text"], "text")
        return CLIPConfig.from_dict(data, "student")


def _tower(shape: TowerShape, base: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of the base that the shape changes. A tower that keeps its layers also keeps unequal blocks."""
    layers, width = shape.layers or len(base["heads"]), shape.width or base["width"]
    if not isinstance(layers, int):
        raise ValueError(f"student.{name}.layers: one number of blocks, not {len(layers)}; only a ResNet has stages")
    changed: dict[str, Any] = {"width": width}
    for key, default in (
        ("heads", lambda v: v if width == base["width"] else v and max(1, width // base["head_dim"])),
        ("mlp_width", lambda v: v and max(1, v * width // base["width"])),
    ):
        given, values = getattr(shape, key), base[key]
        if given is not None:
            changed[key] = [given] * layers
        elif layers == len(values):
            changed[key] = [v if v is None else default(v) for v in values]
        elif len(set(values)) == 1:
            changed[key] = [default(values[0])] * layers
        else:
            raise ValueError(f"student.{name}.{key}: the blocks to inherit are unequal, so say how many each has")
    for key in ("image_size", "context_length"):
        if getattr(shape, key, None) is not None:
            changed[key] = getattr(shape, key)
    return changed


def _resnet(shape: VisionShape, base: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a ResNet that the shape changes: all channel counts scale like the first bottleneck's."""
    if shape.mlp_width is not None:
        raise ValueError("student.vision.mlp_width: a ResNet has no MLPs")
    old = base["conv1"][0][0]
    new = shape.width or old

    def scale(values: Sequence[Any]) -> list[Any]:
        return [max(1, v * new // old) if isinstance(v, int) else scale(v) for v in values]

    changed: dict[str, Any] = {key: scale(base[key]) for key in ("stem", "channels", "conv1", "conv2")}
    changed["heads"] = shape.heads or scale([base["heads"]])[0]
    if isinstance(shape.layers, int):
        raise ValueError("student.vision.layers: a ResNet has four stages, e.g. [3, 4, 6, 3]")
    for key in ("conv1", "conv2"):
        stages = zip(changed[key], shape.layers or map(len, changed[key]), strict=True)
        changed[key] = [_repeated(values, layers, f"vision.{key}") for values, layers in stages]
    return changed | ({"image_size": shape.image_size} if shape.image_size else {})


def _repeated(values: list[int], layers: int, name: str) -> list[int]:
    if layers != len(values) and len(set(values)) > 1:
        raise ValueError(f"student.{name}: the blocks to inherit are unequal, so a stage cannot be shortened")
    return values if layers == len(values) else values[:1] * layers
