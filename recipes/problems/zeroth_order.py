"""A classifier trained by policy gradient on a loss that only answers right or wrong, against supervision.

accelerate launch recipes/problems/zeroth_order.py
python recipes/problems/zeroth_order.py dataset=FOLDER_WITH_MNIST width=256 samples=8
"""

from pipelines.problems.zeroth_order import zeroth_order
from pipelines.recipe import recipe

main = recipe(zeroth_order, __doc__)

if __name__ == "__main__":
    main()
