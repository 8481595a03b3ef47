"""What the four image stages share: their fields, and the way from images to a saved and measured pipeline.

A stage is one line:  ``return run_method(config, build)``  with ``build(config, images: ImageSet) -> Method``.
"""
