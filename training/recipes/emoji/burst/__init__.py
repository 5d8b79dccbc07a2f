"""Training the packaged model in one short run on one GPU that no network reaches: packed, trained, brought home.

`pack` writes one folder of what such a machine needs, `train` makes an autoencoder, a denoiser and a few-step denoiser
of it within a given number of seconds, and `unpack` makes pipeline folders of the weights it leaves.
"""
