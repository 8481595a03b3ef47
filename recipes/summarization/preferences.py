"""Sample summaries from a policy and keep the pairs an annotator tells apart, or convert people's preferences.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/summarization/preferences.py \\
        --config recipes/summarization/demo.yaml samples=4
"""

from pipelines.recipe import recipe
from pipelines.seq2seq.preferences import preferences

main = recipe(preferences, __doc__)

if __name__ == "__main__":
    main()
