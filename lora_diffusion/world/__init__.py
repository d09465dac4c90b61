"""The embedded world: synthetic people, and the training of the models that draw and recognise them.

Nobody who works with real photos and a real Stable Diffusion needs it. The product never imports it.
"""
