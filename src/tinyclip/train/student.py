"""The module a stage trains: it takes a batch and returns everything the loss needs.

As a single module it can be wrapped in DistributedDataParallel, which waits for the gradient of every parameter with
`requires_grad`; `set_trained` sets that only for parameters the loss reaches.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from tinyclip.data.loader import image_input, shorten
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.model import CLIP, Block
from tinyclip.recipe.stage import Stage
from tinyclip.teachers.teacher import AnyTeacher, Features
from tinyclip.train.pruner import Pruner


class Student(nn.Module):
    """A CLIP with its learned masks and its projections to the teacher's embedding size, as trained by a stage.

    Args:
        projections: from `make_projections`; may be empty.
        end_id: id of the end token, after which texts are cut.
        precision: precision of the towers; everything else is float32.
    """

    def __init__(
        self,
        model: CLIP,
        projections: nn.ModuleDict,
        pruner: Pruner | None,
        stage: Stage,
        preprocess: Preprocess,
        end_id: int,
        precision: str,
    ) -> None:
        super().__init__()
        self.model, self.projections = model, projections
        self.hard = pruner.hard if pruner else None
        self.constraint = pruner.constraint if pruner else None
        self.pruner, self.stage, self.preprocess = pruner, stage, preprocess
        self.end_id, self.precision = end_id, precision
        self.encode_image, self.encode_text = model.encode_image, model.encode_text
        if stage.compile:  # texts come in many lengths; one kernel should serve them all
            self.encode_image = torch.compile(model.encode_image)
            self.encode_text = torch.compile(model.encode_text, dynamic=True)
            # Dynamo reads `.grad` of every argument, and masks are not leaves.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)

    def forward(self, images: Tensor, tokens: Tensor, step: int, theirs: Features | None = None) -> dict[str, Tensor]:
        """Return everything the loss depends on, in float32 (float64 for a float64 model).

        Args:
            images: uint8 (n, 3, s, s) on the model's device.
            tokens: int64 (n, length).
            step: step of the stage; the masks' noise depends on it.
            theirs: the teacher's features; they replace those of an untrained tower, which is the teacher's own.

        Returns:
            `image`, `text`: (n, embed_dim), normalised; with projections `projected_image` and `projected_text`,
            (n, the teacher's embed_dim), not normalised; `scale`, exp(logit_scale), if the stage learns it;
            `constraint` if it learns masks. The last two are scalars.
        """
        towers, device = self.stage.towers, self.model.logit_scale.device
        masks = self.pruner.sample(step) if self.pruner else None
        image, text = theirs or (None, None)
        # A new autocast for each call: casts cached in a forward pass without gradient would have none either.
        with torch.autocast(device.type, getattr(torch, self.precision), enabled=self.precision != "float32"):
            if image is None or towers != "text":
                pixels = image_input(images, self.preprocess).to(self.model.logit_scale.dtype)
                image = self.encode_image(pixels, masks, normalize=True)
            if text is None or towers != "image":
                shorter = shorten(tokens, self.end_id, self.model.config.text.context_length)
                shorter = shorter.to(device, non_blocking=True)
                text = self.encode_text(shorter, masks, normalize=True)
        outputs = {
            name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in (("image", image), ("text", text))
        }
        for name, projection in self.projections.items():
            outputs[f"projected_{name}"] = projection(outputs[name])
        if self.stage.loss.learns_scale:
            outputs["scale"] = self.model.logit_scale.exp()
        if self.constraint is not None:
            outputs["constraint"] = self.constraint(self.hard, step)
        return outputs


def set_trained(model: CLIP, stage: Stage) -> None:
    """Set `requires_grad` exactly for the parameters that the stage's loss reaches. Excluded are an untrained tower
    (the text tower with `towers: image`), a fixed scale, and the inputs of an attention without heads, which only
    adds a bias."""
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(stage.towers in ("both", "image" if key.startswith("visual.") else "text"))
    model.logit_scale.requires_grad_(stage.loss.learns_scale)
    for block in model.modules():
        if isinstance(block, Block) and block.attn is not None and block.ln_1 is not None and not block.attn.heads:
            for part in (block.ln_1, block.attn.in_proj_weight, block.attn.in_proj_bias, block.attn.out_proj.weight):
                part.requires_grad_(False)


def make_projections(student: CLIP, teacher: AnyTeacher | None, stage: Stage) -> nn.ModuleDict:
    """Return learned maps from the student's embedding to the teacher's, for the loss terms that need them. They start
    as the identity on the first dimensions, which is how students inherit, and are not part of the student."""
    projections = nn.ModuleDict()
    if teacher is not None and {"feature", "interactive"} & set(stage.loss.distils):
        for name in ("image", "text"):
            projection = nn.Linear(student.config.embed_dim, teacher.embed_dim, bias=False)
            nn.init.eye_(projection.weight)
            projections[name] = projection
    return projections


def check_compiler(device: torch.device) -> None:
    """Compile a small function to test the compiler.

    Raises:
        ValueError: if torch.compile does not work on this machine.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(64, device=device))
    except RuntimeError as error:
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"compile: torch.compile does not work here ({text}); install a C++ compiler or leave it out"
        ) from None
