"""Wrong settings: keys, values, YAML, chains, stages."""

import shutil

from tests.chain.conftest import CHAIN
from tests.chain.wrong_input import At, Wrong, kind


@kind
def unknown_key(at: At) -> Wrong:
    says = "sft.learning_rat=0.1: unknown key; did you mean 'learning_rate'?"
    return Wrong(at.chain("sft.learning_rat=0.1"), [says])


@kind
def unknown_key_of_a_recipe(at: At) -> Wrong:
    says = "sead=1: unknown key; did you mean 'seed'?"
    return Wrong(at.corpus(at.data, "sead=1"), [says])


@kind
def key_that_no_stage_has(at: At) -> Wrong:
    says = "learning_rat=0.1: no stage or field of this name; did you mean 'learning_rate'?"
    return Wrong(at.chain("learning_rat=0.1"), [says])


@kind
def key_inside_a_number(at: At) -> Wrong:
    return Wrong(
        at.chain("sft.learning_rate.x=1"), ["sft.learning_rate.x=1: unknown key; did you mean 'learning_rate'?"]
    )


@kind
def nothing_as_input_and_output(at: At) -> Wrong:
    tail = "is empty; give a value, or leave the field out"
    argv = ["--recipe", "summarization/corpus", "output_dir=", "dataset="]
    return Wrong(argv, [f"output_dir=: {tail}", f"dataset=: {tail}"])


@kind
def nothing_as_the_runs_folder(at: At) -> Wrong:
    says = "--output_dir=: is empty; name a folder, or leave the option out"
    return Wrong(["run", str(CHAIN), "--output_dir", ""], [says])


@kind
def names_that_leave_the_folder(at: At) -> Wrong:
    file = at.write("climb.yaml", "name: ../mine\nstages:\n  a/b: {recipe: summarization/corpus}\n")
    tail = "cannot be the name of a folder; write letters, digits, _, - and ."
    return Wrong(["run", str(file)], [f"name=../mine: {tail}", f"stages=a/b: {tail}"])


@kind
def stage_that_the_chain_has_not(at: At) -> Wrong:
    return Wrong(at.chain("sfft.seed=1"), ["sfft.seed=1: no stage or field of this name; did you mean 'sft'?"])


@kind
def several_mistakes_at_once(at: At) -> Wrong:
    argv = at.chain("sft.learning_rate=fast", "dpo.beta=-1", "ppo.rolouts=3", "reward.keep=first", "nonsense=1")
    says = [
        "nonsense=1: no stage or field of this name; …",
        "sft.learning_rate=fast: input should be a valid number…; give float, such as 0.0001",
        "reward.keep=first: input should be 'last' or 'best'; give one of 'last', 'best', such as 'last'",
        "ppo.rolouts=3: unknown key; did you mean 'rollouts'?",
        "dpo.beta=-1: input should be greater than 0; give float, such as 0.1",
    ]
    return Wrong(argv, says)


@kind
def several_mistakes_at_once_on_a_finished_run(at: At) -> Wrong:
    shutil.copytree(at.run, at.out)
    says = [
        "sft.max_steps=many: input should be a valid integer…; give int, such as -1",
        "evaluate.split=tests: input should be 'train', 'validation' or 'test'; give one of …",
    ]
    return Wrong(at.chain("sft.max_steps=many", "evaluate.split=tests"), says)


@kind
def combination_that_cannot_be(at: At) -> Wrong:
    says = "mini_batch_size=6: does not divide a rollout; give a divisor of …"
    argv = at.recipe("ppo", f"model={at.run}/sft", "reward=rouge", "mini_batch_size=6", "samples_per_source=2")
    return Wrong(argv, [says])


@kind
def needed_value_missing(at: At) -> Wrong:
    says = ["model=: a value is needed; give model=… (…)", "preferences=: a value is needed; give preferences=… (…)"]
    return Wrong(at.recipe("dpo"), says)


@kind
def override_without_a_value(at: At) -> Wrong:
    says = "override=seed: not of the form key=value; write it as key=value"
    return Wrong(at.chain("seed"), [says])


@kind
def config_is_missing(at: At) -> Wrong:
    file = at.folder / "none.yaml"
    return Wrong(at.recipe("sft", "--config", str(file)), [f"config={file}: no such file; mend the path"])


@kind
def config_is_a_folder(at: At) -> Wrong:
    says = f"config={at.folder}: is a folder; give the YAML file in it"
    return Wrong(at.recipe("sft", "--config", str(at.folder)), [says])


@kind
def key_twice_in_yaml(at: At) -> Wrong:
    file = at.write("twice.yaml", "seed: 1\nbatch_size: 4\nseed: 2\n")
    says = f"config={file} line 3: not valid YAML (the key 'seed' stands twice); mend that line"
    return Wrong(at.recipe("sft", "--config", str(file)), [says])


@kind
def broken_yaml(at: At) -> Wrong:
    file = at.write("broken.yaml", "name: x\nstages:\n  corpus: {recipe: [\n")
    return Wrong(["run", str(file), "--output_dir", str(at.out)], [f"chain={file} line 4: not valid YAML (…); mend …"])


@kind
def cyclic_chain(at: At) -> Wrong:
    table = "{recipe: summarization/corpus, dataset: '${%s}'}"
    stages = "".join(f"  {name}: {table % before}\n" for name, before in (("a", "c"), ("b", "a"), ("c", "b")))
    file = at.write("circle.yaml", "name: circle\nstages:\n" + stages)
    says = "stages=a -> c -> b -> a: these stages wait for one another; take one of the references out"
    return Wrong(["run", str(file), "--output_dir", str(at.out)], [says])


@kind
def chain_of_unknown_parts(at: At) -> Wrong:
    text = "name: x\nsteps: 1\nstages:\n  corpus: {recipe: summarization/corpus}\n"
    file = at.write("key.yaml", text)
    says = "steps=1: unknown key in key.yaml; did you mean 'stages'?"
    return Wrong(["run", str(file), "--output_dir", str(at.out)], [says])


@kind
def chain_of_unknown_recipes_and_stages(at: At) -> Wrong:
    text = "stages:\n  a: {recipe: summarization/corpora}\n  b: {recipe: summarization/corpus, dataset: '${c}'}\n"
    file = at.write("parts.yaml", text)
    says = [
        "a.recipe=summarization/corpora: no such recipe; did you mean 'summarization/corpus'?",
        "b=${c}: no such stage; the keys are: a, b",
    ]
    return Wrong(["run", str(file), "--output_dir", str(at.out)], says)


@kind
def unknown_chain(at: At) -> Wrong:
    return Wrong(["run", "demmo", "--output_dir", str(at.out)], ["chain=demmo: no such chain; did you mean 'demo'?"])


@kind
def unknown_stage_until(at: At) -> Wrong:
    says = "--until=rewards: the chain tiny has no such stage; did you mean 'reward'?"
    return Wrong(at.chain("--until", "rewards"), [says])


@kind
def unknown_stage_force(at: At) -> Wrong:
    shutil.copytree(at.run, at.out)
    says = "--force=pppo: the chain tiny has no such stage; did you mean 'ppo'?"
    return Wrong(at.chain("--force", "pppo"), [says])


@kind
def unknown_stage_of_a_recipe(at: At) -> Wrong:
    argv = at.recipe("ppo", "--config", str(CHAIN), "--stage", "dpo")
    return Wrong(argv, ["--stage=dpo: not a stage of this recipe in the chain; …ppo…"])


@kind
def stage_before_its_inputs(at: At) -> Wrong:
    folder = at.out / "corpus"
    mend = f"run it first: genalign run {CHAIN} --output_dir {at.out} --until ppo"
    says = f"corpus={folder}: this stage comes before and is not finished; {mend}"
    return Wrong(at.recipe("ppo", "--config", str(CHAIN)), [says])


@kind
def launcher_file_missing(at: At) -> Wrong:
    file = at.folder / "none.yaml"
    says = f"--config_file={file}: no such file; see the folder accelerate_configs"
    return Wrong(at.chain("--launcher", "accelerate", "--config_file", str(file)), [says])
