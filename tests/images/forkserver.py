"""``tests/chain/forkserver.py`` with the imports that the image stages need."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.chain.forkserver import serve


def main() -> None:
    import accelerate
    import diffusers.training_utils
    import sklearn.datasets
    import transformers.optimization
    from diffusers import DDPMPipeline, UNet2DModel

    _heavy = (accelerate, diffusers, sklearn, transformers, DDPMPipeline, UNet2DModel)
    serve()


if __name__ == "__main__":
    main()
