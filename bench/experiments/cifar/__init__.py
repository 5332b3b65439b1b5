"""ResNet-18 on images of 32 x 32: BatchNorm converted to whitening, trained, resumed, folded, exported.

    python -m bench.experiments.cifar --norm iternorm
    torchrun --nproc-per-node 2 -m bench.experiments.cifar --norm iternorm --data FOLDER --out DIR

Without --data the images are scikit-learn's digits, made larger; FOLDER has CIFAR-10's binary version. SGD with
momentum .9 and weight decay 5e-4; random crops, with CIFAR-10 also flips. --batch-size is that of all processes
together, and so is the mean that the loss is: on several processes IterNorm and DBN have the statistics of the whole
batch (SyncIterNorm, SyncDBN), BatchNorm and POP-Norm each process's own. Processes have a GPU each, or all use the CPU.

DIR gets checkpoint.pt after every epoch, from which --resume goes on to the same bits; curves.csv and curves.png; at
the end folded.pt2, the network in evaluation without its normalizations, exported for any batch size, and summary.csv.
Its input is standardized by the mean and std in the checkpoint.
"""
