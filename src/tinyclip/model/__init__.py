"""What a CLIP is: its shape (`config`), the name of every axis of every parameter (`axes`), masks over these axes
(`masks`), the two towers (`model`, `resnet`), and what they cost (`costs`, `speed`).

Imports common. Begin with `config`, then `axes`."""
