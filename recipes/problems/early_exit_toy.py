"""When the sign of a sum of shrinking Gaussians is known early: in closed form, in log space, by simulation.

accelerate launch recipes/problems/early_exit_toy.py
python recipes/problems/early_exit_toy.py depths='[1, 10, 40]' margins='[5, 0.1, 0.0001]'
"""

from pipelines.problems.early_exit_toy import early_exit_toy
from pipelines.recipe import recipe

main = recipe(early_exit_toy, __doc__)

if __name__ == "__main__":
    main()
