"""The synthetic linear setting: what theory says about one noisy sum against noise at every step, and where it loses.

This theory is the companion's own. It was written without the paper's full text and is not the paper's theorem.

=============  ==============================================================================
`setting`      the model of the data, its checks, and (epsilon, delta) -> mu-GDP
`deepsets`     risk of DP-DeepSets: exact clipped moments, the best clip, where the error comes from
`subspace`     what public tasks teach about the subspace, and how many are too few
`rivals`       DP gradient descent, noisy sufficient statistics, projected DP-GD, hybrid, non-private
`bounds`       what nobody without public data can beat; when DP-DeepSets provably wins; where it loses
`simulation`   every procedure run on random data; shares nothing with the formulas but the model
`learned`      a DeepSets hypernetwork trained end to end on public tasks
`agreement`    formulas against simulations over whole grids, as a table
`figures`      the figures of the chapter
=============  ==============================================================================

Every risk function takes a :class:`~hyperdp_lib.theory.setting.LinearSetting` (the world: all of it public), the number
of private examples ``num_private`` and the privacy parameter ``mu``. The last two may be arrays; they are broadcast.
The neighbouring relation is ``zero_out`` throughout: one record is replaced by one that contributes nothing, and the
number of records is public.
"""
