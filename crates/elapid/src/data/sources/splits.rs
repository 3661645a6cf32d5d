//! Which files of a dataset's repository, or of a folder that is laid out like one, belong to a configuration and a split.
//!
//! The `configs` in the YAML head of its README.md say so; without them, names of folders and files do.

use std::path::Path;

use glob::{MatchOptions, Pattern};
use yaml_rust2::{Yaml, YamlLoader};

use super::Format;
use crate::Error;

/// What may say which file is what.
pub(in crate::data) const README: &str = "README.md";

/// Words that name a split in a file's path.
const SPLITS: [&str; 6] = ["train", "test", "validation", "valid", "dev", "eval"];

/// What is wanted of a dataset.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::data) struct Wanted<'a> {
    /// None: the usual one, or the only one.
    pub(in crate::data) config: Option<&'a str>,
    /// None: `train`.
    pub(in crate::data) split: Option<&'a str>,
}

/// A configuration of a README.
struct Config {
    name: String,
    usual: bool,
    /// Folder that the patterns start from, or that the files lie in.
    folder: String,
    /// Splits and the patterns of their files' paths; none: names tell.
    splits: Vec<(String, Vec<String>)>,
}

impl Wanted<'_> {
    /// Those of `paths`, which are separated by `/`, in their order.
    ///
    /// # Errors
    /// There is no such configuration or split, or several configurations and none was chosen; no file that can be read.
    pub(in crate::data) fn among(self, paths: &[String], readme: &str) -> Result<Vec<String>, Error> {
        let configs = configs(readme)?;
        if configs.is_empty() {
            return self.by_name(paths);
        }
        let names = || configs.iter().map(|config| &config.name[..]).collect::<Vec<_>>().join(", ");
        let found = match (self.config, &configs[..]) {
            (Some(name), _) => configs.iter().find(|config| config.name == name),
            (None, [one]) => Some(one),
            (None, _) => configs
                .iter()
                .find(|config| config.usual)
                .or_else(|| configs.iter().find(|config| config.name == "default")),
        };
        let Some(config) = found else {
            let what = match self.config {
                Some(name) => format!("there is no configuration {name:?}"),
                None => "there are several configurations".into(),
            };
            return Err(Error::new(what)
                .with_hint(format!("choose one with --dataset-config; there are: {}", names())));
        };
        let inside = |path: &&String| {
            config.folder.is_empty()
                || path.strip_prefix(&config.folder).is_some_and(|rest| rest.starts_with('/'))
        };
        let paths: Vec<String> = paths.iter().filter(inside).cloned().collect();
        if config.splits.is_empty() {
            return Wanted { config: None, ..self }.by_name(&paths);
        }
        let split = self.split.unwrap_or("train");
        let there = config.splits.iter().map(|(name, _)| &name[..]).collect::<Vec<_>>().join(", ");
        let Some((_, patterns)) = config.splits.iter().find(|(name, _)| name == split) else {
            return Err(Error::new(format!(
                "there is no split {split:?} in the configuration {:?}",
                config.name
            ))
            .with_hint(format!("choose one with --split; there are: {there}")));
        };
        let options = MatchOptions { require_literal_separator: true, ..MatchOptions::new() };
        let patterns = patterns
            .iter()
            .map(|pattern| {
                let pattern = pattern.trim_start_matches("./");
                let whole = if config.folder.is_empty() {
                    pattern.to_owned()
                } else {
                    format!("{}/{pattern}", Pattern::escape(&config.folder))
                };
                Pattern::new(&whole).map_err(|cause| {
                    Error::new(format!("{README} names files as {pattern:?}: {cause}"))
                        .with_hint("download the files and give their paths")
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let named = |path: &&String| patterns.iter().any(|pattern| pattern.matches_with(path, options));
        let files: Vec<String> = paths.iter().filter(named).cloned().collect();
        match files.iter().find(|path| !is_data(path)) {
            None if files.is_empty() => {
                Err(Error::new(format!("no file matches what {README} says of the split {split:?}"))
                    .with_hint("download the files and give their paths"))
            }
            None => Ok(files),
            Some(other) => Err(Error::new(format!("{other} cannot be read")).with_hint(READABLE)),
        }
    }

    /// By names alone: files of one format, Parquet before others; of one configuration, which is a folder; with the
    /// split's name in their path, where any split's is in one.
    fn by_name(self, paths: &[String]) -> Result<Vec<String>, Error> {
        let mut files: Vec<&String> = paths.iter().filter(|path| is_data(path)).collect();
        if files.is_empty() {
            return Err(Error::new("there is no file that can be read").with_hint(READABLE));
        }
        let mut tops: Vec<&str> = files.iter().filter_map(|path| folders(path).first().copied()).collect();
        tops.sort_unstable();
        tops.dedup();
        if let Some(config) = self.config {
            files.retain(|path| folders(path).contains(&config) || folders(path).join("-") == config);
            if files.is_empty() {
                return Err(Error::new(format!("there is no configuration {config:?}")).with_hint(format!(
                    "choose another with --dataset-config, or leave it out; folders: {}",
                    tops.join(", ")
                )));
            }
        } else if tops.contains(&"data") {
            files.retain(|path| folders(path).first() == Some(&"data"));
        } else if tops.len() > 1 && !tops.iter().any(|top| SPLITS.contains(top)) {
            return Err(Error::new("there are several configurations")
                .with_hint(format!("choose one with --dataset-config; there are: {}", tops.join(", "))));
        }
        let rank = |path: &str| match Format::of(Path::new(path)).0 {
            Format::Parquet => 0,
            Format::Lines => 1,
            Format::Json => 2,
            Format::Csv(_) => 3,
            Format::Arrow => 4,
            Format::Text => 5,
        };
        let best = files.iter().map(|path| rank(path)).min();
        files.retain(|path| Some(rank(path)) == best);
        let split = self.split.unwrap_or("train");
        let named: Vec<&str> =
            SPLITS.into_iter().filter(|word| files.iter().any(|path| mentions(path, word))).collect();
        let wanted: Vec<String> =
            files.iter().filter(|path| mentions(path, split)).map(|path| (*path).clone()).collect();
        match (wanted.is_empty(), named.is_empty()) {
            (false, _) => Ok(wanted),
            (true, true) if split == "train" => Ok(files.into_iter().cloned().collect()),
            (true, true) => Err(Error::new(format!("there is no split {split:?}"))
                .with_hint("no file name mentions a split; leave --split out")),
            (true, false) => Err(Error::new(format!("there is no split {split:?}"))
                .with_hint(format!("choose another with --split; file names mention: {}", named.join(", ")))),
        }
    }

    /// Of the branch that the Hub has converted: `configuration/split/0000.parquet`.
    ///
    /// # Errors
    /// As [`Self::among`].
    pub(in crate::data) fn converted(self, paths: &[String]) -> Result<Vec<String>, Error> {
        let files = || paths.iter().filter(|path| path.ends_with(".parquet") && folders(path).len() == 2);
        let choice = |what: &str,
                      flag: &str,
                      place: usize,
                      wanted: Option<&str>,
                      within: Option<&str>,
                      usual: &str| {
            let inside = files().filter(|path| within.is_none_or(|config| folders(path)[0] == config));
            let mut there: Vec<&str> = inside.map(|path| folders(path)[place]).collect();
            there.sort_unstable();
            there.dedup();
            let hint = format!("choose one with {flag}; there are: {}", there.join(", "));
            match wanted {
                Some(wanted) if there.contains(&wanted) => Ok(wanted.to_owned()),
                Some(wanted) => Err(Error::new(format!("there is no {what} {wanted:?}")).with_hint(hint)),
                None if there.contains(&usual) => Ok(usual.to_owned()),
                None if there.len() == 1 => Ok(there[0].to_owned()),
                None => Err(Error::new(format!("there are several {what}s")).with_hint(hint)),
            }
        };
        let config = choice("configuration", "--dataset-config", 0, self.config, None, "default")?;
        let split = choice("split", "--split", 1, self.split, Some(&config), "train")?;
        Ok(files().filter(|path| folders(path) == [&config[..], &split[..]]).cloned().collect())
    }
}

const READABLE: &str =
    "Parquet, JSON lines, JSON, CSV, Arrow and text files are read, and what the Hub has made Parquet of";

/// The configurations that the YAML head of a README names.
fn configs(readme: &str) -> Result<Vec<Config>, Error> {
    let head = readme.strip_prefix('\u{feff}').unwrap_or(readme);
    let mut lines = head.lines();
    if lines.next().map(str::trim_end) != Some("---") {
        return Ok(Vec::new());
    }
    let head: String =
        lines.take_while(|line| line.trim_end() != "---").flat_map(|line| [line, "\n"]).collect();
    let fault = |what: &str| {
        Error::new(format!("the head of {README} cannot be understood: {what}"))
            .with_hint("download the files and give their paths")
    };
    let documents = YamlLoader::load_from_str(&head).map_err(|cause| fault(&cause.to_string()))?;
    let list = match documents.first().map(|document| &document["configs"]) {
        None | Some(Yaml::BadValue) => return Ok(Vec::new()),
        Some(list) => list.as_vec().ok_or_else(|| fault("`configs` is no list"))?,
    };
    // A name may look like a number.
    let text = |yaml: &Yaml| match yaml {
        Yaml::String(text) | Yaml::Real(text) => Some(text.clone()),
        Yaml::Integer(number) => Some(number.to_string()),
        _ => None,
    };
    let texts = |yaml: &Yaml| -> Option<Vec<String>> {
        match yaml.as_vec() {
            Some(list) => list.iter().map(|one| one.as_str().map(str::to_owned)).collect(),
            None => Some(vec![yaml.as_str()?.to_owned()]),
        }
    };
    list.iter()
        .map(|config| {
            let splits = match &config["data_files"] {
                Yaml::BadValue => Vec::new(),
                files => match texts(files) {
                    Some(patterns) => vec![("train".to_owned(), patterns)],
                    None => files
                        .as_vec()
                        .into_iter()
                        .flatten()
                        .map(|split| Some((text(&split["split"])?, texts(&split["path"])?)))
                        .collect::<Option<Vec<_>>>()
                        .filter(|splits| !splits.is_empty())
                        .ok_or_else(|| fault("`data_files` is no list of `split` and `path`"))?,
                },
            };
            Ok(Config {
                name: text(&config["config_name"]).unwrap_or_else(|| "default".into()),
                usual: config["default"] == Yaml::Boolean(true),
                folder: text(&config["data_dir"]).unwrap_or_default().trim_matches(['.', '/']).to_owned(),
                splits,
            })
        })
        .collect()
}

fn is_data(path: &str) -> bool {
    let file = Path::new(path);
    let text = |file: &Path| file.extension().is_some_and(|extension| extension == "txt");
    let hidden = path.split('/').any(|part| part.starts_with('.'));
    let settings = ["dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json"];
    let named = file.file_name().is_some_and(|name| settings.iter().any(|known| name == *known));
    let format = Format::of(file).0 != Format::Text || text(file) || text(&file.with_extension(""));
    format && !hidden && !named
}

/// The folders that a file lies in, from the outermost.
fn folders(path: &str) -> Vec<&str> {
    let mut parts: Vec<&str> = path.split('/').collect();
    parts.pop();
    parts
}

fn mentions(path: &str, word: &str) -> bool {
    path.split(['/', '-', '_', '.']).any(|part| part.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(paths: &[&str]) -> Vec<String> {
        paths.iter().map(|path| (*path).to_owned()).collect()
    }

    fn chosen(paths: &[&str], config: Option<&str>, split: Option<&str>) -> Result<Vec<String>, Error> {
        Wanted { config, split }.among(&owned(paths), "# no head")
    }

    #[test]
    fn the_files_of_a_split_are_found() {
        let stories = [
            "README.md",
            "data/train-0.parquet",
            "data/train-1.parquet",
            "data/validation-0.parquet",
            "old.txt",
        ];
        assert_eq!(chosen(&stories, None, None).unwrap(), ["data/train-0.parquet", "data/train-1.parquet"]);
        assert_eq!(chosen(&stories, None, Some("validation")).unwrap(), ["data/validation-0.parquet"]);
        let error = chosen(&stories, None, Some("test")).unwrap_err();
        assert!(
            error.to_string().contains("no split \"test\"")
                && error.hint().unwrap().contains("train, validation")
        );

        let several = ["en/c4-train.0.json.gz", "en/c4-validation.0.json.gz", "en.x/c4-train.0.json.gz"];
        let error = chosen(&several, None, None).unwrap_err();
        assert!(error.hint().unwrap().contains("there are: en, en.x"), "{error:?}");
        assert_eq!(chosen(&several, Some("en"), None).unwrap(), ["en/c4-train.0.json.gz"]);
        assert!(chosen(&several, Some("de"), None).unwrap_err().to_string().contains("\"de\""));

        assert_eq!(chosen(&["a.jsonl.zst", "b.csv"], None, None).unwrap(), ["a.jsonl.zst"]);
        assert_eq!(
            chosen(&["s/10B/x.parquet", "s/1B/y.parquet"], Some("s-1B"), None).unwrap(),
            ["s/1B/y.parquet"]
        );
        assert_eq!(chosen(&["train/a.txt", "test/a.txt"], None, Some("test")).unwrap(), ["test/a.txt"]);
        assert!(chosen(&["README.md", ".x.json", "a.py"], None, None).is_err());
        let error = chosen(&["a.jsonl"], None, Some("test")).unwrap_err();
        assert!(error.hint().unwrap().contains("leave --split out"), "{error:?}");
    }

    #[test]
    fn the_head_of_the_readme_says_which_files() {
        let readme = "---\nlicense: mit\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path:\n    - a/*.parquet\n    \
                      - \"more/**/x.jsonl\"\n  - split: held_out\n    path: b.parquet\n- config_name: socratic\n  default: true\n  \
                      data_dir: s\n  data_files: \"*.csv\"\n- config_name: rest\n  data_dir: ./r/\n- config_name: tar\n  data_files: [z.tar]\n---\n\
                      # x\n---\n";
        let paths = owned(&[
            "a/0.parquet",
            "a/deep/1.parquet",
            "b.parquet",
            "more/2/3/x.jsonl",
            "more/x.jsonl",
            "r/test.csv",
            "r/train.csv",
            "s/deep/no.csv",
            "s/q.csv",
            "z.tar",
        ]);
        let get = |config, split| Wanted { config, split }.among(&paths, readme);
        assert_eq!(get(Some("main"), None).unwrap(), ["a/0.parquet", "more/2/3/x.jsonl", "more/x.jsonl"]);
        assert_eq!(get(Some("main"), Some("held_out")).unwrap(), ["b.parquet"]);
        assert_eq!(get(None, None).unwrap(), ["s/q.csv"]);
        assert_eq!(get(Some("rest"), Some("test")).unwrap(), ["r/test.csv"]);
        for (config, split, expected, hint) in [
            (Some("other"), None, "no configuration \"other\"", "main, socratic, rest, tar"),
            (Some("main"), Some("test"), "no split \"test\"", "train, held_out"),
            (Some("tar"), None, "z.tar cannot be read", "Parquet"),
        ] {
            let error = get(config, split).unwrap_err();
            assert!(
                error.to_string().contains(expected) && error.hint().unwrap().contains(hint),
                "{error:?}"
            );
        }
        let unmarked = readme.replace("  default: true\n", "");
        let error = Wanted::default().among(&paths, &unmarked).unwrap_err();
        assert!(error.to_string().contains("several configurations"), "{error}");
        let none = Wanted::default()
            .among(&owned(&["y.csv"]), "---\nconfigs:\n- data_files: x.csv\n---\n")
            .unwrap_err();
        assert!(none.to_string().contains("no file matches"), "{none}");
        for bad in [
            "---\nconfigs: [\n---\n",
            "---\nconfigs: 7\n---\n",
            "---\nconfigs:\n- data_files: [{a: b}]\n---\n",
        ] {
            let error = Wanted::default().among(&paths, bad).unwrap_err();
            assert!(error.to_string().contains("README.md cannot be understood"), "{error}");
        }
    }

    #[test]
    fn converted_branches_have_a_folder_a_split() {
        let all = owned(&[
            "b/test/0000.parquet",
            "b/train/0000.parquet",
            "b/train/0001.parquet",
            "d/test/0000.parquet",
        ]);
        let paths = |config, split| Wanted { config, split }.converted(&all);
        assert_eq!(paths(Some("b"), None).unwrap(), ["b/train/0000.parquet", "b/train/0001.parquet"]);
        assert_eq!(paths(Some("d"), None).unwrap(), ["d/test/0000.parquet"]);
        assert!(paths(None, None).unwrap_err().hint().unwrap().contains("b, d"));
        assert!(paths(Some("b"), Some("x")).unwrap_err().hint().unwrap().contains("test, train"));
    }
}
