"""The CLIP model: config, towers, named axes, masks, cost.

`config` describes every shape a model can have, `axes` names every axis of every parameter, `masks` are multipliers on
these axes, `model` and `resnet` are the towers, `costs` and `speed` count and time them.

May import: common. Start with `config`, then `axes`."""
