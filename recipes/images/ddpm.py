"""Train a denoising diffusion (DDPM) of images, sampled by DDPM, DDIM or DPM-Solver; with labels, if wanted.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/images/ddpm.py \\
        --config recipes/images/ddpm.yaml dataset=FOLDER_WITH_MNIST
    python recipes/images/ddpm.py class_conditional=true guidance_scale=2 sampler=dpm_solver inference_steps=20
"""

from pipelines.images.ddpm import ddpm
from pipelines.recipe import recipe

main = recipe(ddpm, __doc__)

if __name__ == "__main__":
    main()
