"""What competes, each in a process of its own; the measurements that every contender offers.

A measurement is a method that takes and returns JSON values; a contender may lack some.

    step(size, batch, backbone, seconds): training steps on a fixed batch, for about `seconds`;
        gives `passes` (forward and backward), `whole` (and the optimizer) and the first `loss`
    forward(size, batch, seconds): seconds of passes in eval mode, from pictures to anomaly maps
    evaluate(count, seconds): from `count` anomaly maps to both AUROCs; gives `seconds`, `image`, `pixel`
    epoch(data, category, train, test, batch): one epoch on the first pass over that many pictures, then an evaluation;
        gives `features`, `training`, `evaluation` (seconds), `image`, `pixel` and the process's `peak` memory in bytes
    model(category, target, weights, steps, batch): from picture files to an exported model, in so many steps or by the
        contender's own recipe (null); gives `epochs` and `steps`
    peak(): the largest size of the process's memory so far, in bytes
    save(file): writes the model as a checkpoint that can be exported
    describe(): versions and settings
"""
