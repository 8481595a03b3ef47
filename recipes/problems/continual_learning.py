"""Permuted digits learned one task after another by SGD: naively, with EWC and with rehearsal.

accelerate launch recipes/problems/continual_learning.py
python recipes/problems/continual_learning.py dataset=FOLDER_WITH_MNIST seeds=3 lambdas='[1, 10, 100]'
"""

from pipelines.problems.continual_learning import continual_learning
from pipelines.recipe import recipe

main = recipe(continual_learning, __doc__)

if __name__ == "__main__":
    main()
