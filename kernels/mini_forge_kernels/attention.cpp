// Attention in blocks of queries, and its gradients, for float32 on CPUs with AVX-512. What it computes, and why so, is in
// attention.py, which compiles this file and calls the functions at its end.
//
// A task is a document and some query heads that look at one key head: their queries are put below each other, so that keys
// are read once for all of them. A block's weights p, (queries, keys), stay in the second cache from the product that makes
// them to those that use them.

#include <omp.h>

#include "tile.h"

struct View {  // x[row, head, :] lies at `at` + row * per_row + head * per_head
  float* at;
  long per_row, per_head;
};

struct Segment {
  long start, length;
};

struct Block {  // of queries: `size` rows from `row` on, that see `seen` keys, the last of which are their own
  long row, size, seen;
};

struct Chain {  // of segments, each of which continues the one before; the last one's queries see them all, `keys` in all
  long first_block, blocks, first_segment, segments, keys, part;  // of these queries; the chain's first row in dk and dv
};

struct Work {  // fields as in attention.py's _Work
  const Segment* segments;
  const Block* blocks;
  const Chain* chains;
  long chain_count, heads, key_heads, together, channels, most_queries, most_keys, per_thread;
  float scale;
  int threads;
};

namespace {

long padded(long n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// row = softmax of its first `seen` numbers, and zeros up to `width`, a multiple of WIDTH.
void softmax(float* row, long seen, long width) {
  const ints place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  floats most = all(-__builtin_inff()), total = {};
  for (long j = 0; j < width; j += WIDTH) {
    const floats x = place + int(j) < int(seen) ? load(row + j) : all(-__builtin_inff());
    most = larger(x, most);
    store(row + j, x);
  }
  most = all(largest(most));
  for (long j = 0; j < width; j += WIDTH) {
    const floats p = place + int(j) < int(seen) ? exp(load(row + j) - most) : floats{};
    total += p;
    store(row + j, p);
  }
  const floats share = all(1 / sum(total));
  for (long j = 0; j < width; j += WIDTH) store(row + j, share * load(row + j));
}

// dp ← p ⊙ (dp − Σ p dp), a row of `width` numbers, a multiple of WIDTH
void softmax_backward(const float* p, float* dp, long width) {
  floats products = {};
  for (long j = 0; j < width; j += WIDTH) products += load(p + j) * load(dp + j);
  const floats total = all(sum(products));
  for (long j = 0; j < width; j += WIDTH) store(dp + j, load(p + j) * (load(dp + j) - total));
}

// `together` query heads from `head` on, of one chain, in a thread's own room.
struct Task {
  const Work& work;
  const Chain& chain;
  const long group = work.heads / work.key_heads, channels = work.channels, head, width = padded(chain.keys);
  float *const q, *const mixed, *const p, *const dp, *const keys, *const values;  // the last two turned: (channels, width)

  Task(const Work& work, float* room, long i)
      : work(work),
        chain(work.chains[i / (work.heads / work.together)]),
        head(i % (work.heads / work.together) * work.together),
        q(room + omp_get_thread_num() * work.per_thread),
        mixed(q + work.most_queries * channels),
        p(mixed + work.most_queries * channels),
        dp(p + work.most_queries * padded(work.most_keys)),
        keys(dp + work.most_queries * padded(work.most_keys)),
        values(keys + channels * padded(work.most_keys)) {}

  const float* of_keys(const View& x, long row) const {
    return x.at + row * x.per_row + head / group * x.per_head;
  }

  // visit(first key's place in the chain, its row, keys) for each segment, of the chain's first `seen` keys
  template <class Visit>
  void segments(long seen, Visit visit) const {
    const Segment* segment = work.segments + chain.first_segment;
    for (long place = 0; place < seen; place += segment++->length)
      visit(place, segment->start, std::min(segment->length, seen - place));
  }

  // The last block of queries, which alone sees all keys, comes first.
  template <class Visit>
  void blocks(Visit visit) const {
    for (long i = chain.blocks - 1; i >= 0; i--) visit(work.blocks[chain.first_block + i]);
  }

  // The chain's rows of x (keys, key_heads, channels), turned, with zeros behind them.
  void turn(const View& x, float* to) const {
    for (long c = 0; c < channels; c++) store(to + (c + 1) * width - WIDTH, floats{});
    segments(chain.keys, [&](long place, long start, long count) {
      const float* from = of_keys(x, start);
      for (long row = 0; row < count; row += WIDTH)
        for (long c = 0; c < channels; c += WIDTH) {
          floats a[WIDTH];
          const long here = std::min(WIDTH, count - row);
          for (long i = 0; i < WIDTH; i++) a[i] = i < here ? load(from + (row + i) * x.per_row + c) : floats{};
          transpose(a);
          for (long i = 0; i < WIDTH; i++) store(to + (c + i) * width + place + row, a[i], here);
        }
    });
  }

  // visit(row of x, row of `copy`) for the block's queries, head after head
  template <class Visit>
  void each_query(const View& x, const Block& block, float* copy, Visit visit) const {
    for (long h = head; h < head + work.together; h++)
      for (long row = block.row; row < block.row + block.size; row++, copy += channels)
        visit(x.at + row * x.per_row + h * x.per_head, copy);
  }
  void gather(const View& x, const Block& block, float factor, float* to) const {
    each_query(x, block, to, [&](const float* at, float* copy) {
      for (long c = 0; c < channels; c += WIDTH) store(copy + c, factor * load(at + c));
    });
  }
  void scatter(float* from, const Block& block, float factor, const View& x) const {
    each_query(x, block, from, [&](float* at, const float* copy) {
      for (long c = 0; c < channels; c += WIDTH) store(at + c, factor * load(copy + c));
    });
  }

  // q, times scale, and p of a block; `keys` turned
  void weights(const Block& block, const View& query) const {
    const long queries = block.size * work.together, seen = padded(block.seen);
    gather(query, block, work.scale, q);
    product(q, channels, 1, keys, width, channels, p, width, queries, seen, false);
    for (long i = 0; i < queries; i++) softmax(p + i * width, block.seen - block.size + i % block.size + 1, seen);
  }

  // mixed (queries, channels) = a (queries, keys) times rows of x
  void mix(const Block& block, const float* a, const View& x) const {
    segments(block.seen, [&](long place, long start, long count) {
      product(a + place, width, 1, of_keys(x, start), x.per_row, count, mixed, channels, block.size * work.together, channels,
              place > 0);
    });
  }
};

}  // namespace

extern "C" {

extern const long size_of_Work = sizeof(Work), size_of_View = sizeof(View);

// query, out (rows, heads, channels); key, value (rows, key_heads, channels); room: `per_thread` numbers for each thread.
void attend(const Work* work, float* room, const View* query, const View* key, const View* value, const View* out) {
#pragma omp parallel for num_threads(work->threads) schedule(dynamic)
  for (long i = 0; i < work->chain_count * (work->heads / work->together); i++) {
    const Task task(*work, room, i);
    task.turn(*key, task.keys);
    task.blocks([&](const Block& block) {
      task.weights(block, *query);
      task.mix(block, task.p, *value);
      task.scatter(task.mixed, block, 1, *out);
    });
  }
}

// dq as query. dk, dv (rows of all chains, groups of heads that are together, channels): a chain's segments one behind
// another, so that no two tasks write to one place. Where chains share rows or groups a key head, `sum_parts` makes dk and
// dv of them.
void attend_backward(const Work* work, float* room, const View* query, const View* key, const View* value, const View* grad,
                     const View* dq, const View* dk, const View* dv) {
#pragma omp parallel for num_threads(work->threads) schedule(dynamic)
  for (long i = 0; i < work->chain_count * (work->heads / work->together); i++) {
    const Task task(*work, room, i);
    const long width = task.width, channels = task.channels;
    const auto part = [&](const View& x) {
      return x.at + task.chain.part * x.per_row + task.head / work->together * x.per_head;
    };
    task.turn(*key, task.keys);
    task.turn(*value, task.values);
    task.blocks([&](const Block& block) {
      const long queries = block.size * work->together, seen = padded(block.seen);
      const bool adds = block.seen < task.chain.keys;  // to what the first one wrote
      task.weights(block, *query);
      task.gather(*grad, block, 1, task.mixed);
      product(task.p, 1, width, task.mixed, channels, queries, part(*dv), dv->per_row, block.seen, channels, adds);
      product(task.mixed, channels, 1, task.values, width, channels, task.dp, width, queries, seen, false);
      for (long j = 0; j < queries; j++) softmax_backward(task.p + j * width, task.dp + j * width, seen);
      product(task.dp, 1, width, task.q, channels, queries, part(*dk), dk->per_row, block.seen, channels, adds);
      task.mix(block, task.dp, *key);
      task.scatter(task.mixed, block, work->scale, *dq);
    });
  }
}

// total (rows, key_heads, channels), zeros, += the parts of each of its rows and heads.
void sum_parts(const Work* work, const View* parts, const View* total) {
  const long each_key = work->heads / work->together / work->key_heads;  // parts
#pragma omp parallel for num_threads(work->threads)
  for (long head = 0; head < work->key_heads; head++)
    for (const Chain* chain = work->chains; chain < work->chains + work->chain_count; chain++) {
      const float* part = parts->at + chain->part * parts->per_row + head * each_key * parts->per_head;
      for (long i = chain->first_segment; i < chain->first_segment + chain->segments; i++) {
        const Segment& segment = work->segments[i];
        for (long row = segment.start; row < segment.start + segment.length; row++, part += parts->per_row)
          for (long one = 0; one < each_key; one++)
            each(work->channels, [&](long j, long count) {
              float* to = total->at + row * total->per_row + head * total->per_head + j;
              store(to, load(to, count) + load(part + one * parts->per_head + j, count), count);
            });
      }
    }
}

}
