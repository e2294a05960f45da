"""What users of other libraries call things: ultralytics', transformers' and timm's words for keys and methods."""

from __future__ import annotations

_KEYS = {
    "data.source": "dataset dataset_name dataset_path data_dir data_path train_dir image_folder root",
    "data.validation": "val valid val_split validation_split val_fraction",
    "evaluation.batch_size": "per_device_eval_batch_size eval_batch_size validation_batch_size val_batch_size",
    "evaluation.every": "eval_steps eval_strategy evaluation_strategy eval_interval "
    "val_interval check_val_every_n_epoch",
    "evaluation.select": "metric metric_for_best_model eval_metric monitor",
    "evaluation.patience": "early_stopping early_stopping_patience",
    "checkpoint.every": "save_steps save_strategy save_period save_interval save_every save_freq checkpoint_interval",
    "checkpoint.keep": "save_total_limit checkpoint_hist keep_checkpoints",
    "output": "output_dir out_dir save_dir log_dir logdir logging_dir work_dir project_dir",
    "name": "run_name exp_name experiment experiment_name",
    "from": "init_checkpoint initial_checkpoint load_from finetune ckpt ckpt_path resume_from pretrain",
    "seed": "random_seed manual_seed random_state",
    "net.backbone": "model arch architecture model_name model_name_or_path backbone_name encoder network",
    "net.pretrained": "use_pretrained",
    "net.weights_file": "weights weights_path pretrained_path pretrained_cfg",
    "net.trainable": "freeze freeze_backbone frozen unfreeze freeze_layers",
    "net.tuning": "lora peft adapter use_lora finetuning",
    "net.options.drop_path_rate": "drop_path",
    "net.options.drop_rate": "dropout drop",
    "method.name": "loss criterion loss_name loss_function loss_fn algorithm",
    "method.name=class_balanced": "class_weights class_weight cls_weights weighted weighted_loss balanced pos_weight",
    "loader.sampler": "weighted_sampler class_balanced_sampling balanced_sampler oversample oversampling resampling",
    "optimizer.name": "opt optim optimiser",
    "optimizer.lr": "lr0 learning_rate base_lr lr_base max_lr peak_lr learningrate",
    "optimizer.weight_decay": "wd decay l2 weightdecay",
    "optimizer.clip_norm": "max_grad_norm clip_grad grad_clip gradient_clip_val clip_grad_norm gradient_clipping clip",
    "schedule.name": "sched scheduler lr_scheduler lr_scheduler_type lr_schedule cos_lr",
    "schedule.final": "lrf min_lr final_lr eta_min",
    "schedule.warmup_epochs": "warmup warmup_steps warmup_ratio warmup_iters",
    "schedule.milestones": "decay_milestones decay_epochs lr_steps lr_milestones step_size",
    "train.epochs": "epoch num_epochs num_train_epochs max_epochs n_epochs nepochs total_epochs max_steps",
    "train.batch_size": "batch_size batch bs b batchsize per_device_train_batch_size train_batch_size total_batch_size",
    "train.accumulate": "gradient_accumulation_steps grad_accum_steps grad_accum accumulation_steps accum_iter "
    "accumulate_grad_batches nbs",
    "train.precision": "amp fp16 bf16 half mixed_precision amp_dtype dtype",
    "train.ema": "model_ema ema_decay model_ema_decay use_ema",
    "train.fit_batch": "auto_find_batch_size autobatch",
    "mix.mixup": "mixup_alpha mix_up",
    "mix.cutmix": "cutmix_alpha cut_mix",
    "method.label_smoothing": "smoothing label_smoothing_factor",
    "speed.workers": "num_workers n_workers dataloader_num_workers",
    "speed.compile": "torch_compile torchcompile",
    "speed.grad_checkpointing": "gradient_checkpointing",
    "track.log_with": "report_to tracker logger log_wandb use_wandb wandb tensorboard",
    "hub.repo": "hub_model_id push_to_hub repo_id",
}
KEYS = {word: key for key, words in _KEYS.items() for word in words.split()}

_SIZES = (
    "images are sized by the views, such as  views.train='random_resized_crop(224,0.08,1,bicubic) | flip' "
    "views.eval='resize(256,bicubic) | center_crop(224)'"
)
_DEVICES = "no key chooses the device: CUDA_VISIBLE_DEVICES=1 picks a GPU, ACCELERATE_USE_CPU=1 the CPU"
_CLASSES = "the classes come from the data (data.source, data.index)"
_POLICY = "augmentation is views.train, such as  views.train='random_resized_crop(224,0.08,1,bicubic) | flip'"
_ELSEWHERE = {
    _SIZES: "imgsz img_size image_size input_size crop_size resolution size crop_pct",
    _DEVICES: "device devices gpu gpus gpu_id cuda local_rank no_cuda use_cpu accelerator n_gpu num_gpus",
    _CLASSES: "num_classes nc n_classes num_labels classes class_names names label_names",
    _POLICY: "aa auto_augment augment augmentation augmentations transform transforms randaugment rand_augment hflip "
    "fliplr color_jitter reprob random_erasing",
    "a run is resumed by --resume": "resume resume_from_checkpoint",
    "one step without training is --dry-run": "dry_run fast_dev_run",
    "images are corrupted, not trained on, by  rescom-timm robustness": "corruption corruptions",
}
ELSEWHERE = {word: advice for advice, words in _ELSEWHERE.items() for word in words.split()}
"""What is no key of a recipe, and what to do instead."""

_METHODS = {
    "cross_entropy": "ce crossentropy softmax xent plain erm baseline",
    "balanced_softmax": "balanced balsoftmax balsfx bsce bs balanced_ce",
    "focal": "focal_loss focalloss",
    "class_balanced": "weighted_ce weighted_cross_entropy weighted wce cb cb_loss cb_focal class_weights",
    "ldam": "ldam_drw drw",
    "logit_adjustment": "la logit_adjust logit_adjusted",
    "rescom": "supcon contrastive siamese",
    "paco": "gpaco parametric_contrastive",
    "experts": "ride ensemble mixture_of_experts moe",
    "las": "mislas label_aware_smoothing",
    "crt": "decoupling decouple classifier_retraining",
    "causal_norm": "causal tde",
}
METHODS = {word: name for name, words in _METHODS.items() for word in words.split()}


def plain(name: str) -> str:
    """A word as the tables have it: the last part of a key, in lower case, with underscores."""
    return name.rpartition(".")[2].lower().lstrip("-").replace("-", "_")


def meant(name: str, value: str = "") -> str:
    """What to write in the place of a key or an option of another library; "" where it is none that is known. value: as
    it was given, if it was."""
    word = plain(name)
    if word in ELSEWHERE:
        return ELSEWHERE[word]
    key = KEYS.get(word)
    if key is None:
        return ""
    return f"did you mean {key}{f'={value}' if value and '=' not in key else ''}?"
