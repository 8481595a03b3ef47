"""A residual network with a way out after each stage: accuracy, work and time over the threshold of exit.

accelerate launch recipes/problems/early_exit_network.py
python recipes/problems/early_exit_network.py dataset=FOLDER_WITH_MNIST early_weight=0.5
"""

from pipelines.problems.early_exit_network import early_exit_network
from pipelines.recipe import recipe

main = recipe(early_exit_network, __doc__)

if __name__ == "__main__":
    main()
