"""The mistakes that the privacy tests must detect; tests/mutants.py puts each of them into a copy of src/."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A mistake: `changes` are (old, new) texts in src/`file`, each old one there exactly once; `tests` may see it."""

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]  # pytest's file::test; the file's name alone, in whatever folder of tests/ it is


PLAN, SAMPLING, CLIPPING, LAYERS, MECHANISM, RANDOMNESS, ACCOUNTING = (
    f"privacy/{name}.py" for name in ("plan", "sampling", "clipping", "unit_gradients", "mechanism", "randomness",
                                      "accounting"))
TRAINING, LEDGER, PROVENANCE = "run/loop.py", "privacy/ledger.py", "run/provenance.py"
PRODUCTS, CHAINED = "base/products.py", "base/chain.py"
RANKS = ("test_privacy_plan.py::test_noise_has_its_scale_after_the_all_reduce",)
STEP = ("test_private_step.py::test_a_step_is_the_mechanism_written_out",)
DRAWS = ("test_privacy_plan.py::test_draws_are_disjoint_and_the_extras_are_summed_and_no_more",)
SAMPLER = ("test_sampling.py::test_poisson_is_independent_inclusion",)
EMPTY = ("test_private_step.py::test_an_empty_run_takes_all_its_steps",
         "test_privacy_plan.py::test_empty_draws_everywhere_are_steps_like_any_other")
SEED = ("test_privacy_plan.py::test_one_random_seed_does_not_decide_the_noise",)
STREAMS = ("test_randomness.py::test_streams_of_other_purposes_and_ranks_are_others",)
LLAMA = ("test_clipping_llama.py::test_engines_equal_the_loop",)
LOOP = ("test_clipping.py::test_engines_equal_the_loop", "test_clipping.py::test_one_more_unit_moves_the_sum_by_c")
FAULTY = ("test_clipping.py::test_units_without_a_finite_gradient_give_nothing",)
RECORD = ("test_privacy_plan.py::test_the_record_is_on_disk_before_the_mask_is_drawn",)
BUDGET = ("test_privacy_plan.py::test_the_budget_is_checked_before_a_step_is_drawn",)
DROPOUT = ("test_private_step.py::test_dropout_masks_are_no_function_of_the_random_seed",)
ENTROPY = ("test_randomness.py::test_the_masks_of_dropout_have_more_than_32_bits",)
BF16 = ("test_clipping.py::test_float32_and_bf16_norms_are_of_what_is_summed",)
AGAIN = ("test_recompute.py::test_the_same_bits_with_and_without",)
CANCEL = ("test_rounding.py::test_positions_that_cancel_in_float32",)
TIED = ("test_rounding.py::test_lookups_and_head_that_cancel",)
ALIGNED = ("test_rounding.py::test_no_data_move_the_sum_by_more_than_the_noise_pays_for",)
ROWS = ("test_clipping.py::test_units_of_several_texts",)
ALIKE = ("test_author_cache.py::test_names_that_look_alike_are_one_author",)
CHANCE = ("test_accounting_exact.py::test_a_small_chance_of_a_draw_is_a_chance",)
MANY = ("test_accounting_exact.py::test_the_rounding_of_many_steps_is_paid_for",)
LOSSES = "privacy/loss_grid.py"
ATTACK, RISK = "privacy/attack_risk.py", tuple(f"test_attack_risk.py::{name}" for name in (
    "test_a_monte_carlo_attack", "test_one_step_is_never_below_exact_arithmetic",
    "test_what_is_above_the_grid_counts_as_found", "test_the_worse_direction_bounds_both"))
WITHOUT = ("test_gpt2_ft.py::test_steps_without_noise_are_not_forgotten",)
ALLOCATION = ("test_sampling.py::test_allocation_is_one_uniform_step_of_each_epoch",
              "test_sampling.py::test_what_an_allocation_charges")
EPOCH = ("test_allocation.py::test_an_epoch_whole_or_in_part_by_drawing_it",)
SUMS = ("test_allocation.py::test_grids_far_apart_are_summed_at_once",)
LENGTHS = ("test_allocation.py::test_epochs_of_many_lengths_cost_a_little_more",)
SHUFFLE = ("test_sampling.py::test_shuffle_uses_each_unit_once_an_epoch",)
UNLIKE = ("test_neighbours.py::test_ranks_that_compute_in_different_ways_are_refused",)
SINGLE = ("test_rounding.py::test_float32_products_that_cancel_stay_below_C",)
OVERFLOW = ("test_rounding.py::test_a_float32_product_that_would_overflow_adds_nothing",)
GRAMS = ("test_rounding.py::test_shared_gram_matrices_are_those_of_the_rows",)
FORMED = ("test_clipping_llama.py::test_products_formed_alone",)
COMPANY = ("test_company.py::test_the_same_bits_in_any_company",)
NEIGHBOURS = ("test_neighbours.py::test_one_more_unit_through_the_script",)
PAID = ("test_neighbours.py::test_what_rounding_may_move_is_paid_for",)
NAMED = ("test_disclosed.py::test_every_file_and_entry_is_named",)
SHOWN = ("test_disclosed.py::test_nothing_that_is_covered_follows_from_one_unit_but_through_the_noise",)
VALIDATION = ("test_gpt2_ft.py::test_the_training_file_is_no_validation_data",)
ALONE = tuple(f"test_ledger_alone.py::{name}" for name in (
    "test_a_second_writer_finds_what_the_first_wrote_and_the_first_stops",
    "test_what_another_writes_at_the_same_moment_is_never_cut"))
UNSYNCED = ("test_ledger_alone.py::test_where_a_ledger_cannot_be_synced_nothing_is_drawn",)
ASKED = ("test_faults.py::test_asked_to_stop",)
TAKEN = ("test_ledger_alone.py::test_a_copy_of_the_whole_ledger_is_not_the_run_s_file_either",)
AUDITING = "privacy/auditing.py"
UNPAID = ("test_auditing.py::test_guesses_are_those_of_a_plain_loop",)
INTEGRAL = ("test_auditing.py::test_gaussian_p_value_is_an_integral",)
DECIDES = ("test_privacy_audit.py::test_what_decides",)
UNKNOWN = ("test_formats.py::test_a_ledger_of_an_unknown_format_is_refused",)
KEPT = ("test_formats.py::test_what_is_kept_of_an_earlier_format_is_what_was_written",)
EARLIER = ("test_formats.py::test_a_ledger_without_format_numbers_counts_as_it_did",)
CHAIN = ("test_provenance.py::test_the_chain_outlives_its_folders",)
FOREIGN, SHARDS = "weights/foreign.py", ("test_foreign.py::test_runs_are_found_behind_shards",)
SPENDING, BUDGETS = "run/spending.py", "privacy/budget.py"
SELECTED = ("test_selection.py::test_epsilon_is_dp_accounting_s",
            "test_selection.py::test_never_below_the_truth_where_it_can_be_computed")
RACE = ("test_budget_faults.py::test_released_while_it_draws_no_step_is_lost",)
LINKS = ("test_provenance.py::test_weights_under_a_link",)
LABEL_NORM = ("test_label_counts.py::test_a_unit_changes_the_total_by_one_at_most",)
LABEL_NOISE = ("test_label_counts.py::test_the_noise_is_gaussian_of_its_scale",)
LABEL_CHARGE = ("test_label_counts.py::test_the_charge_is_on_disk_before_the_noise_is_drawn",)
LABEL_BUDGET = ("test_label_counts.py::test_the_budget_is_never_passed",)
LABELS, LABEL_RUN = "privacy/label_counts.py", "run/label_counts.py"
PAIRS = ("test_records.py::test_one_more_unit_of_prompts_and_completions",)

STD = "self.std, self.batch, self.world, self.source = sigma * sensitivity,"
ADD_NOISE = "self.source.add_normal_(own, self.std)"
MASK = "return self.own[self.source.uniform(len(self.own)) < self.q]"
FACTORS = "factors, finite = self.rule.factors(self.norms_sq)"
BEGIN_NOISE = "if self.std > 0:\n            assert"
ADD_NORM = "self.norms_sq[:, self.column[id(parameter)]] += contribution.norm_sq()"

MUTANTS = (
    Mutant("noise at 0.9 sigma", MECHANISM, ((STD, STD.replace("= sigma", "= 0.9 * sigma")),), RANKS),
    Mutant("noise missing on a rank", MECHANISM,
           ((BEGIN_NOISE, BEGIN_NOISE.replace("> 0:", "> 0 and self.world.rank != 1:")),), RANKS),
    Mutant("noise of every rank on every coordinate", MECHANISM,
           ((ADD_NOISE, ADD_NOISE.replace("own", "sums[:coordinates]")),), RANKS),
    Mutant("half of the coordinates without noise", MECHANISM,
           (("self.world.share(coordinates)", "self.world.share(coordinates // 2)"),), RANKS),
    Mutant("shares that leave gaps", "base/distributed.py",
           (("min(length * (self.rank + 1), coordinates)", "min(length * self.rank + length // 2, coordinates)"),),
           RANKS),
    Mutant("noise repeated in every step", MECHANISM,
           (("self.source.begin_step(step)", "self.source.begin_step(1)"),), STEP),
    Mutant("noise without C", MECHANISM, ((STD, STD.replace(" * sensitivity", "")),), RANKS),
    Mutant("clip after the mean", CLIPPING,
           ((FACTORS, "factors, finite = torch.ones_like(self.norms_sq), torch.ones(batch.units, dtype=torch.bool)"),
            ("        finally:\n            self.batch, self.noted",
             "                self.flat.grad.mul_((self.rule.C * batch.units / self.flat.grad.norm()).clamp(max=1.0))\n"
             "        finally:\n            self.batch, self.noted")), LOOP),
    Mutant("mask reused in the next step", SAMPLING,
           ((MASK, "if step % 2:\n            self.mask = self.source.uniform(len(self.own)) < self.q\n"
             "        return self.own[self.mask]"),),
           SAMPLER),
    Mutant("empty draws skipped", TRAINING,
           (("self.learner.optimizer.step(", "len(drawn) and self.learner.optimizer.step("),), EMPTY + STEP),
    Mutant("empty draws released without noise", MECHANISM,
           ((BEGIN_NOISE, BEGIN_NOISE.replace("> 0:", "> 0 and sums.any():")),), EMPTY),
    Mutant("empty draws drawn again", SAMPLING,
           ((MASK, "for _ in range(50):\n            found = self.own[self.source.uniform(len(self.own)) < self.q]\n"
             "            if len(found):\n                break\n        return found"),), STEP),
    Mutant("batch divided by its actual size", MECHANISM,
           ((".div_(self.batch)", ".div_(max(1.0, float(sums[coordinates + 1])))"),), STEP),
    Mutant("batch token mean", "corpus/batching.py",
           (("np.repeat(1 / (np.maximum(counts, 1) * rows_per_unit), counts)",
             "np.full(counts.sum(), len(counts) / max(1, counts.sum()))"),), STEP),
    Mutant("cross term dropped", CLIPPING, (("head.cross(table) + head.slack", "head.slack"),), LOOP),
    Mutant("ledger written after the step", PLAN,
           (("                    self.ledger.charge(step)\n", ""),
            ("        self.open = None\n        return grad",
             "        if self.ledger is not None:\n            self.ledger.charge(self.open)\n"
             "        self.open = None\n        return grad")), RECORD),
    Mutant("q per rank", SAMPLING,
           (("self.q, self.source = batch / N,", "self.q, self.source = batch / N / world.size,"),), DRAWS),
    Mutant("every rank draws from all the units", SAMPLING,
           (("torch.arange(N)[world.rank :: world.size]", "torch.arange(N)"),), DRAWS + SAMPLER),
    Mutant("the same key on each rank", RANDOMNESS,
           (("{self.purpose},{self.rank},{step}", "{self.purpose},{step}"),), SAMPLER + SEED),
    Mutant("the same key for mask and noise", RANDOMNESS,
           (("{self._seed},{self.purpose},", "{self._seed},"),), STREAMS),
    Mutant("the key from --random_seed", RANDOMNESS,
           (("key = os.urandom(KEY_BYTES)", "key = torch.initial_seed().to_bytes(KEY_BYTES, 'little')"),), SEED),
    Mutant("a parameter left out of the norms", CLIPPING,
           ((ADD_NORM, f"if type(module) is nn.LayerNorm: continue\n                {ADD_NORM}"),), LOOP),
    Mutant("a parameter left out of the sum", CLIPPING,
           (("self.noted += contributions\n", "self.noted += [one for one in contributions if one[0].dim() > 1]\n"),),
           LOOP),
    Mutant("per_layer gives C to each parameter", CLIPPING,
           (("bound = self.C / math.sqrt(norms_sq.shape[1])", "bound = self.C"),), LOOP),
    Mutant("an own head's norm left out", CLIPPING,
           ((ADD_NORM, f"if type(module) is Head: continue\n                {ADD_NORM}"),), LLAMA),
    Mutant("a cross term of an own head", CLIPPING,
           (("if self.tied_trains:", "if self.head_trains:"),
            ("head = next(c for parameter, c in self.noted if parameter is weight and isinstance(c, Ragged))",
             "head = next(c for _, c in self.noted if isinstance(c, Ragged))"),
            ("table = next(c for parameter, c in self.noted if parameter is weight and isinstance(c, Lookup))",
             "table = next(c for _, c in self.noted if isinstance(c, Lookup))")), LLAMA),
    Mutant("RMSNorm's gradient without the normaliser", LAYERS,
           (("Rows(target, x * inverse * g)", "Rows(target, x * g)"),), LLAMA),
    Mutant("RMSNorm's normaliser over all heads", LAYERS,
           (("inverse = inverse_rms(x.flatten(0, 1), module.eps).view(*x.shape[:2], 1)",
             "inverse = inverse_rms(x.flatten(1), module.eps)[:, :, None]"),), LLAMA),
    Mutant("the sum over a key head's queries missing", PRODUCTS,
           (("            total = total + one\n", "            pass\n"),),
           ("test_llama.py::test_logits_and_gradients_equal_hugging_face",)),
    Mutant("no unit clipped", CLIPPING,
           ((FACTORS, f"{FACTORS}\n                factors = torch.ones_like(factors)"),), LOOP),
    Mutant("names that look alike are several authors", "corpus/records.py",
           (("name = unit_name(written)", "name = written or None"),), ALIKE),
    Mutant("texts clipped in place of units", CLIPPING,
           (("U = self.batch.units\n", "U = len(self.batch.ids)\n"),), ROWS),
    Mutant("units without a finite gradient let through", CLIPPING,
           (("torch.where(finite[:, None], factors, 0.0), finite", "factors.nan_to_num(1.0, 1.0), finite | True"),),
           FAULTY),
    Mutant("Gram matrices in float32", LAYERS,
           (("return rows @ rows.mT", "return (rows.float() @ rows.float().mT).double()"),), CANCEL),
    Mutant("lookups and head cancel without a bound", CLIPPING,
           (("column.copy_(torch.maximum(column, least))", "pass"),), TIED),
    Mutant("units of a micro-batch added in float32", LAYERS,
           (("target[start : start + rows].addmm_(p[:, start : start + rows].double().T, q)",
             "target[start : start + rows] += p[:, start : start + rows].float().T @ q.float()"),
            ("factor @ grads[:, start : start + columns].double()",
             "factor.float() @ grads[:, start : start + columns].float()")), ALIGNED),
    Mutant("micro-batches added in float32", LAYERS,
           (("        p, q = zero_rows(self.p, finite), zero_rows(self.q, finite)\n",
             "        self.target.copy_(self.target.float())\n"
             "        p, q = zero_rows(self.p, finite), zero_rows(self.q, finite)\n"),), ALIGNED),
    Mutant("sums of any type let through", CLIPPING,
           (("if flat.sums.dtype != torch.float64:", "if False:"),),
           ("test_rounding.py::test_engines_add_units_in_float64_alone",)),
    Mutant("sum rounded to float32 before the noise", MECHANISM,
           (("            assert sums.dtype == torch.float64\n", "            sums.copy_(sums.float())\n"),),
           ("test_privacy_plan.py::test_release_divides_by_the_expected_batch_and_adds_noise_once",)),
    Mutant("sums in bfloat16", PRODUCTS,
           (("return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x", "return x"),),
           BF16),
    Mutant("padded to what was drawn", "run/setup.py",
           (("cut = lengths if planned.private", "cut = lengths if not planned.private"),), NEIGHBOURS),
    Mutant("ranks that compute in different ways let through", "run/setup.py",
           (("if world.size > 1:", "if world.size > 9:"),), UNLIKE),
    Mutant("ranks that round in different ways let through", "run/setup.py",
           (('world.size > 1 and world.device.type == "cpu"', "world.size > 9"),),
           ("test_neighbours.py::test_ranks_that_round_in_different_ways_are_refused",)),
    Mutant("no look at company under frozen weights in bfloat16", "run/setup.py",
           (('"--base_dtype bf16" if recorded["base_dtype"] == "bf16" else None', "None"),),
           ("test_neighbours.py::test_a_machine_whose_kernels_see_company_is_refused",)),
    Mutant("states in the type of the frozen weights", "llama.py",
           (("self.embed_tokens(ids).to(self.norm.weight.dtype)", "self.embed_tokens(ids)"),),
           ("test_base_dtype.py::test_the_bits_are_those_of_float32_matrices_of_the_same_numbers",)),
    Mutant("a block computed again with other dropout masks", "base/recompute.py",
           (("            torch.set_rng_state(self.states[0])\n", ""),), AGAIN),
    Mutant("notes that were dropped not added", CLIPPING,
           (("                self.add_forgotten(factors, mask)\n", ""),), AGAIN),
    Mutant("a block computed again outside autocast", "base/recompute.py",
           (("torch.autocast(self.kind, dtype, enabled)", "torch.autocast(self.kind, dtype, False)"),), AGAIN),
    Mutant("notes that differ the second time let through", CLIPPING,
           (("not same(self.seen, first)", "False"),),
           ("test_recompute.py::test_a_machine_that_computes_a_block_in_another_way_each_time_ends_the_run",)),
    Mutant("a block that stands twice goes unseen when recomputed", CLIPPING,
           (("if module in self.seen:", "if module in self.waiting:"),),
           ("test_recompute.py::test_a_block_that_stands_twice_is_refused_when_it_runs",)),
    Mutant("products of all rows at once", "privacy/clipping.py",
           (("row_blocks(BLOCK_ROWS[batch.ids.device.type])", "row_blocks(0)"),), COMPANY),
    Mutant("rounding of the sum not paid for", PLAN,
           (("return self.clip * (1 + self.rounding)", "return self.clip"),), PAID),
    Mutant("dropout masks from --random_seed", TRAINING,
           (("self.plan.seed_dropout()", "torch.manual_seed(0)"),), DROPOUT),
    Mutant("dropout masks of 32 bits", RANDOMNESS, (("        torch.set_rng_state(state)\n", ""),), ENTROPY),
    Mutant("one step beyond the budget", PLAN, (("if self.permitted < 1:", "if self.permitted < 0:"),), BUDGET),
    Mutant("an allocation reused in the next epoch", SAMPLING,
           (("self.source.begin_step(epoch + 1)\n            self.epoch, self.places",
             "self.source.begin_step(1)\n            self.epoch, self.places"),), ALLOCATION[:1]),
    Mutant("an allocation to too few steps", SAMPLING,
           (("* self.t).long()", "* (self.t - 1)).long()"),), ALLOCATION[:1]),
    Mutant("an allocation priced an epoch short", SAMPLING,
           (("uses[Allocated(sigma, t, t, 1)] += whole", "uses[Allocated(sigma, t, t, 1)] += whole - 1"),),
           ALLOCATION[1:]),
    Mutant("a stopped epoch priced as if its steps were few of many", "privacy/allocation.py",
           (("return (values + (t - taken)) / t", "return (values + (2 * t - taken)) / (2 * t)"),), EPOCH),
    Mutant("values spread without their mean", "privacy/allocation.py",
           (("found[lower : lower + n] += pairs - upper", "found[lower : lower + n] += pairs + upper"),
            ("found[lower + 1 : lower + 1 + n] += upper\n", "pass\n")), EPOCH),
    Mutant("grids far apart summed without what lies at 0", "privacy/allocation.py",
           (("for one, chance in ((self, other.zero), (other, self.zero)):", "for one, chance in ():"),), SUMS),
    Mutant("epochs of many lengths priced as longer ones", "privacy/accounting.py",
           (("_epoch(sigma, max(taken, math.floor(taken / q)), taken)", "_epoch(sigma, phase.t, taken)"),), LENGTHS),
    Mutant("shuffle pads the last batch", SAMPLING,
           (("batch = self.order[", "batch = torch.cat([self.order, self.order])["),),
           SHUFFLE),
    Mutant("training loss in the E2E report", TRAINING,
           (("self.facts.update(self.summary())",
             'self.facts.update({**self.summary(), "train_loss": self.train_loss})'),), NAMED),
    Mutant("norm of the gradient before its noise", TRAINING,
           (("grad = self.plan.release(", "bare = norm(flat.grad)\n        grad = self.plan.release("),
            ("self.task.lr(self.done), norm(grad, flat.sharers)", "self.task.lr(self.done), bare")), SHOWN),
    Mutant("shared validation data counted in the report", "gpt2_ft.py",
           (("setup.VALIDATION_LOSS,", 'f"validation loss; {count_shared(valid, train)} shared",'),), SHOWN),
    Mutant("the training file taken for validation data", "run/setup.py",
           (("if sha256 == train_sha256:", "if False:"),), VALIDATION),
    Mutant("a record that cannot be synced counts as written", CHAINED,
           (("        os.fsync(handle)\n    except OSError:\n        take_back(",
             "        sync(handle)\n    except OSError:\n        take_back("),
            ("import check_file", "import check_file, sync")), UNSYNCED),
    Mutant("SIGHUP is no request to stop", "base/signals.py",
           (("signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)", "signal.SIGINT, signal.SIGQUIT)"),), ASKED),
    Mutant("ledger written over another's records", LEDGER,
           (("os.O_RDWR | os.O_APPEND | (0", "os.O_RDWR | (0"), ("        self.check(undone)\n", "")), ALONE),
    Mutant("unknown format read as the present one", LEDGER,
           (('check_format(record.get("format"), FORMAT, where)', 'min(FORMAT, record.get("format", 1))'),), UNKNOWN),
    Mutant("records of an earlier format kept as of the present one", LEDGER,
           (('record.get("format", ABSENT["format"])', "FORMAT"),), KEPT),
    Mutant("what was not paid for is not told of an earlier format", PLAN,
           (('record["format"] == 1 and', "False and"),),
           ("test_formats.py::test_a_run_without_format_numbers_is_reported_and_resumed",)),
    Mutant("a last line cut short not priced", LEDGER,
           (("if not self.torn or not self.records:", "if True:"),), EARLIER),
    Mutant("a second copy of a ledger goes unseen", LEDGER,
           (('*sorted(glob.glob(f"{glob.escape(path)}{KEPT}.*"))', ""),),
           ("test_ledger_alone.py::test_the_copies_of_two_runs_are_both_asked_for",)),
    Mutant("a ledger put in place of the run's goes unseen", LEDGER,
           (("(present.st_dev, present.st_ino) != (held.st_dev, held.st_ino)", "False"),), TAKEN),
    Mutant("reservation written after the first draw", "run/setup.py",
           (("            reserve(trainer, reservation)\n",
             "            step, name = trainer.step, reservation\n            trainer.step = lambda drawn: "
             "(step(drawn), trainer.plan.hold or reserve(trainer, name))[0]\n"),),
           ("test_budget_runs.py::test_reserved_before_the_first_draw_and_released_after_the_last",)),
    Mutant("reservation of nothing", SPENDING,
           (("ledger=ledger, uses=pack(more))", "ledger=ledger, uses=[])"),),
           ("test_budget_faults.py::test_the_reservation_is_on_disk_before_the_first_step_is_drawn",)),
    Mutant("ledger read before its run is kept from drawing", BUDGETS,
           (("    if opened.state.reservations[name].open:\n        opened.write(\"close\"",
             "    used = charged()\n    if opened.state.reservations[name].open:\n        opened.write(\"close\""),
            ("uses=pack(charged()))", "uses=pack(used))")), RACE),
    Mutant("reservation looked at before the step is charged", PLAN,
           (("                    self.ledger.charge(step)\n", ""),
            ("                    self.permitted -= 1\n",
             "                    self.ledger.charge(step)\n                    self.permitted -= 1\n")),
           ("test_budget_faults.py::test_a_run_that_lost_its_reservation_draws_no_further_step",)),
    Mutant("running reservations not counted", BUDGETS,
           (("sum((one.counted for one in self.reservations.values()), Counter())",
             "sum((one.counted for one in self.reservations.values() if one.released), Counter())"),),
           ("test_budget.py::test_reserved_charged_and_released",)),
    Mutant("a budget of other data accepted", SPENDING, (("if state.data != data:", "if False:"),),
           ("test_budget.py::test_what_is_no_budget_for_a_run",)),
    Mutant("a copied folder shares the reservation", SPENDING,
           (("if resume and held.ledger == real_ledger(folder):", "if resume:"),),
           ("test_budget_faults.py::test_a_copied_or_moved_folder_gets_a_reservation_of_its_own",)),
    Mutant("a ledger that lost records released", SPENDING, (("or steps > state.charged", "or False"),
                                                            ("if last and last not in", "if False and last not in")),
           ("test_budget_faults.py::test_a_run_whose_ledger_is_not_what_it_was_counts_in_full",)),
    Mutant("any ledger at the place released", SPENDING, (("if named_in(folder) != held.name:", "if False:"),),
           ("test_budget_faults.py::test_a_run_whose_ledger_is_not_what_it_was_counts_in_full",)),
    Mutant("a copy of a ledger not counted", "run/composed.py",
           (("first = seen.setdefault((found.st_dev, found.st_ino), ledger)",
             "first = seen.setdefault((0, hash(state.last_checksum)), ledger)"),),
           ("test_composition.py::test_one_file_by_several_names_counts_once_and_copies_count_twice",)),
    Mutant("the number of trials costs nothing", "privacy/selection.py",
           (("math.log(trials.mean) / (ORDERS - 1)", "0 / (ORDERS - 1)"),), SELECTED),
    Mutant("a trial's delta forgotten in private selection", "privacy/selection.py",
           (("rdp + penalty + trials.mean * delta", "rdp + penalty"),), SELECTED),
    Mutant("the cheapest trial prices the selection", "privacy/selection.py", (("worst = np.max(", "worst = np.min("),),
           ("test_selection.py::test_trials_of_different_cost_have_that_of_the_largest",)),
    Mutant("only the last run of a chain named", PROVENANCE,
           (('return [*report["initial_weights"], *([own]', "return [*([own]"),), CHAIN),
    Mutant("links to weights not followed", PROVENANCE,
           (("while os.path.islink(path):", "while False:"),), LINKS),
    Mutant("runs behind a shard not looked for", FOREIGN,
           (("return [(file, privacy_entry(file, {})) for file in shards(path, flag)]", "return [(path, None)]"),),
           SHARDS),
    Mutant("chance of being drawn rounded to zero", ACCOUNTING,
           (("-math.expm1(sum(phase.steps * math.log1p(-phase.q) for phase in phases))",
             "1 - math.prod((1 - phase.q) ** phase.steps for phase in phases)"),), CHANCE),
    Mutant("rounding of many steps forgotten", "privacy/sampled_gaussian.py",
           (("noise = 4 * UNIT * float(", "noise = 0 * float("),), MANY),
    Mutant("one direction of the attack left out", ATTACK,
           (("else np.maximum(self.removed, self.added)", "else self.added"),), RISK[3:]),
    Mutant("losses rounded down", LOSSES,
           (("np.append(lower, 0.0) + np.append(0.0, main - lower)", "np.append(main, 0.0)"),), RISK[1:2]),
    Mutant("infinite loss dropped", LOSSES,
           (("-math.expm1(log_finite) + _beyond(phases, parts, t)", "0.0"),), RISK[2:3]),
    Mutant("one phase of an attack forgotten", ATTACK,
           (("return _attack_risk(accounting.merge(phases))", "return _attack_risk(accounting.merge(phases)[:1])"),),
           RISK[:1]),
    Mutant("advantage is no budget", PLAN,
           (("if settings.target_advantage is not None:", "if False:"),), BUDGET),
    Mutant("the prompt scored", "corpus/records.py",
           (("[*before, *behind[:room]], len(before), cut", "[*before, *behind[:room]], 1, cut"),), PAIRS),
    Mutant("lines of one unit taken for several", "corpus/author_cache.py",
           (("if source.owner_field is None:", "if source.pairs:"),), PAIRS),
    Mutant("steps without noise forgotten", "run/resume.py",
           (('sum(record["sigma"] == 0 for record in ledger.state.records)', "0"),), WITHOUT),
    Mutant("numbers of guesses tried and not paid for", AUDITING,
           (("level = [], (1 - confidence) / len(counts)", "level = [], 1 - confidence"),), UNPAID),
    Mutant("guesses taken for all that there are", AUDITING,
           (("    if guesses == m:\n", "    if True:\n"), ("betainc(right, m - right + 1, ndtr(mu / 2))",
                                                       "betainc(right, guesses - right + 1, ndtr(mu / 2))")), INTEGRAL),
    Mutant("threshold one canary too low", AUDITING,
           (("beta = guesses + 1, m - guesses", "beta = guesses + 2, m - guesses"),), INTEGRAL),
    Mutant("an unproven bound decides", "privacy_audit.py",
           (("return gaussian and own, GAUSSIAN", "return gaussian, GAUSSIAN"),), DECIDES),
    Mutant("float32's rounding of a unit's product not in its norm", LAYERS,
           (("norm = gram_norm_sq(pp, qq).sqrt() + rounding_alone(pp, qq, positions)",
             "norm = gram_norm_sq(pp, qq).sqrt()"),), SINGLE),
    Mutant("a float32 product that overflows", LAYERS,
           (("torch.where(sizes_of(pp, qq) < ALONE_MOST, norm.square(), math.inf)", "norm.square()"),), OVERFLOW),
    Mutant("another input's Gram matrices", LAYERS,
           (("key = rows.data_ptr(), rows.shape,", "key = rows.shape,"),), FORMED),
    Mutant("Gram matrices of another view of the same memory", LAYERS, (("rows.stride(), ", ""),), GRAMS),
    Mutant("Gram matrices of what was changed in place", LAYERS,
           ((", rows.dtype, rows._version", ", rows.dtype"),), GRAMS),
    Mutant("Gram matrices of memory that was given away", LAYERS,
           (("found = key, rows, torch.stack(", "found = key, rows.clone(), torch.stack("),), GRAMS),
    Mutant("each text of a unit counted in the labels", LABELS,
           (("math.isqrt(count * count * SCALE * SCALE // square)", "count * SCALE"),), LABEL_NORM),
    Mutant("labels clipped by their number of kinds", LABELS,
           (("sum(count * count for count in counts.values())", "len(counts)"),), LABEL_NORM),
    Mutant("each text a unit of the labels", LABEL_RUN,
           (("number if source.owner_field is None else record.unit", "number"),), LABEL_NORM),
    Mutant("labels with half of their noise", LABELS,
           (("(sigma, SCALE, SCALE,", "(sigma, SCALE // 2, SCALE,"),), LABEL_NOISE),
    Mutant("labels drawn before they are charged", LABEL_RUN,
           (("    ledger.charge(last[\"step\"])\n", ""), ("    finally:\n        ledger.close()\n",
             "    finally:\n        ledger.charge(1)\n        ledger.close()\n")), LABEL_CHARGE),
    Mutant("labels charged as a drawn share of the units", LABEL_RUN,
           (('"q": 1.0,', '"q": last["q"],'),), LABEL_CHARGE),
    Mutant("labels beyond the budget", LABEL_RUN, (("after > target", "before > target"),), LABEL_BUDGET),
)
