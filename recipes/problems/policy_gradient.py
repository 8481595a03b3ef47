"""The sequence policy gradient by enumeration, baselines, its relation to cross-entropy, and what an RLHF chain gained.

accelerate launch recipes/problems/policy_gradient.py \\
    reward=runs/demo/reward ppo=runs/demo/ppo evaluation=runs/demo/evaluate
python recipes/problems/policy_gradient.py reward=… ppo=… evaluation=… offset=0 length=2
"""

from pipelines.problems.policy_gradient import policy_gradient
from pipelines.recipe import recipe

main = recipe(policy_gradient, __doc__)

if __name__ == "__main__":
    main()
